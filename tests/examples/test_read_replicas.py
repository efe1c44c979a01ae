"""Notes are written on the primary, and read on a replica as long as that serves."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from itsdangerous import TimestampSigner
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from context_async_sqlalchemy import db_session, new_db_session_ctx
from tests.helpers.cluster import primary_and_standby
from tests.helpers.postgres import Server, frozen
from tests.helpers.programs import is_all_closed, load_program, until
from tests.helpers.servers import running_module
from tests.helpers.serving import http_client


@pytest.fixture(scope="module")
def cluster() -> Generator[tuple[Server, Server]]:
    """Return a primary and its standby, which every test of this module leaves as they were."""
    with primary_and_standby() as servers:
        yield servers


@pytest_asyncio.fixture
async def notes(
    cluster: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Any]:
    """Return the program of the notes on a primary and its standby."""
    primary, standby = cluster
    program = load_program(
        monkeypatch,
        "replicas",
        DATABASE_URL=primary.url,
        DATABASE_HOSTS=f"{primary.host},{standby.host}",
    )
    yield program
    assert is_all_closed(program)
    await primary.fetch("DROP TABLE replicated_note")


@pytest_asyncio.fixture
async def client(notes: Any, cluster: tuple[Server, Server]) -> AsyncGenerator[httpx.AsyncClient]:
    async with http_client(notes.app) as client:
        query = "SELECT 1 WHERE to_regclass('replicated_note') IS NOT NULL"
        await until(lambda: cluster[1].fetch(query))
        yield client


@asynccontextmanager
async def replay_paused(standby: Server) -> AsyncGenerator[None]:
    """Let the standby fall behind for a block."""

    async def is_paused() -> bool:
        [row] = await standby.fetch("SELECT pg_get_wal_replay_pause_state()")
        return bool(row[0] == "paused")

    await standby.fetch("SELECT pg_wal_replay_pause()")
    await until(is_paused)
    try:
        yield
    finally:
        await standby.fetch("SELECT pg_wal_replay_resume()")


async def test_whoever_has_written_reads_it_and_others_read_the_replica(
    client: httpx.AsyncClient, notes: Any, cluster: tuple[Server, Server]
) -> None:
    _, standby = cluster
    reader = httpx.AsyncClient(base_url=client.base_url, timeout=30)
    async with reader, replay_paused(standby):
        written = await client.post("/notes/milk")
        assert (written.status_code, written.headers["served-by"]) == (201, "primary")
        assert position_of(client, notes) != notes.UNKNOWN
        assert await read(client) == ("primary", ["milk"])
        assert await read(reader) == ("replica", [])
        assert notes.replica.host == standby.host
    await until(lambda: standby.fetch("SELECT FROM replicated_note"))

    # Once it has caught up, the replica serves the writer, too: without the primary.
    await notes.primary.close()
    assert await read(client) == ("replica", ["milk"])
    assert notes.primary.engine is None


def position_of(client: httpx.AsyncClient, notes: Any) -> str:
    """Return the position that a client has been told."""
    return str(notes.signer.unsign(client.cookies["position"]).decode())


async def read(client: httpx.AsyncClient) -> tuple[str, list[str]]:
    """Return who has answered, and what."""
    response = await client.get("/notes")
    assert response.status_code == 200
    return response.headers["served-by"], response.json()


async def test_a_replica_that_catches_up_in_time_serves_the_writer(
    client: httpx.AsyncClient,
    notes: Any,
    cluster: tuple[Server, Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notes, "PATIENCE", 20)
    async with replay_paused(cluster[1]):
        assert (await client.post("/notes/milk")).status_code == 201
        request = asyncio.create_task(read(client))
        await until(lambda: notes.replica.pool_status().checked_in)
        assert not request.done()
    assert await request == ("replica", ["milk"])


async def test_those_who_wait_hold_no_connection(
    client: httpx.AsyncClient,
    notes: Any,
    cluster: tuple[Server, Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notes, "PATIENCE", 5)
    reader = httpx.AsyncClient(base_url=client.base_url, timeout=30)
    async with reader, replay_paused(cluster[1]):
        assert (await client.post("/notes/milk")).status_code == 201
        requests = [asyncio.create_task(read(client)) for _ in range(20)]
        await until(lambda: notes.replica.pool_status().checked_in)
        assert notes.replica.pool_status().capacity < len(requests)
        assert await read(reader) == ("replica", [])
        assert not any(request.done() for request in requests)
        assert {who for who, _ in await asyncio.gather(*requests)} == {"primary"}


FAR = "FFFFFFFF/FFFFFFFE"  # no replica gets there


@pytest.mark.parametrize("position", [FAR, "FFFFFFFF/FFFFFFFF", "'; DROP TABLE", "x" * 5000])
async def test_a_position_that_a_client_made_up_steers_nothing(
    client: httpx.AsyncClient, notes: Any, position: str
) -> None:
    elsewhere = TimestampSigner("another secret", salt="position").sign(position)
    for value in (position, f'"{position}"', elsewhere.decode()):
        response = await client.get("/notes", headers={"Cookie": f"position={value}"})
        assert (response.status_code, response.headers["served-by"]) == (200, "replica")
    assert notes.primary_to_read.engine is None


async def test_a_position_is_of_no_use_when_its_time_is_over(
    client: httpx.AsyncClient, notes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.cookies["position"] = notes.signer.sign(FAR).decode()
    monkeypatch.setattr(notes, "MAX_AGE", -1)
    assert await read(client) == ("replica", [])


async def test_a_position_that_is_never_reached_makes_nobody_wait_for_ever(
    client: httpx.AsyncClient, notes: Any
) -> None:
    client.cookies["position"] = notes.signer.sign(FAR).decode()
    began = time.monotonic()
    assert await read(client) == ("primary", [])
    assert notes.PATIENCE <= time.monotonic() - began < notes.PATIENCE + 5


async def test_of_a_hundred_requests_that_a_replica_keeps_waiting_twenty_wait(
    client: httpx.AsyncClient,
    notes: Any,
    cluster: tuple[Server, Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notes, "PATIENCE", 20)
    async with replay_paused(cluster[1]):
        assert (await client.post("/notes/milk")).status_code == 201
        requests = [asyncio.create_task(client.get("/notes")) for _ in range(100)]
        await until(lambda: sum(request.done() for request in requests) == 80)
        assert notes.waits.locked()
        assert notes.primary_to_read.pool_status().checked_in <= 5
    served = [(await request).headers.get("served-by") for request in requests]
    assert served.count("replica") == 20


async def test_those_whom_no_replica_serves_leave_the_primary_to_those_who_write(
    client: httpx.AsyncClient, notes: Any, cluster: tuple[Server, Server]
) -> None:
    primary, _ = cluster
    client.cookies["position"] = notes.signer.sign(notes.UNKNOWN).decode()
    # Reads are slow: they wait for a lock.
    async with new_db_session_ctx():
        session = await db_session(notes.primary)
        await session.execute(text("LOCK TABLE replicated_note"))
        requests = [asyncio.create_task(client.get("/notes")) for _ in range(100)]
        await until(lambda: sum(request.done() for request in requests) == 95)
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        assert len(await primary.fetch(waiting)) == 5
        await notes.primary.ping()
    responses = await asyncio.gather(*requests)
    assert sorted(response.status_code for response in responses) == [200] * 5 + [503] * 95
    assert responses[-1].headers["retry-after"]


async def test_the_primary_serves_while_the_replica_is_dead(
    client: httpx.AsyncClient, notes: Any, cluster: tuple[Server, Server]
) -> None:
    primary, standby = cluster
    assert await read(client) == ("replica", [])
    await asyncio.to_thread(standby.kill)
    try:
        assert await read(client) == ("primary", [])
        # The handler finds out, and the connect follows.
        while notes.replica.host != primary.host:
            assert await read(client) == ("primary", [])
        assert await read(client) == ("primary", [])
    finally:
        await asyncio.to_thread(standby.start)

    async def is_back() -> bool:
        return (await read(client))[0] == "replica"

    await until(is_back)


@pytest.mark.skipif(
    version("asyncpg").split(".") < ["0", "32"], reason="asyncpg waits for a silent server here"
)
async def test_the_primary_serves_while_the_replica_says_nothing(
    client: httpx.AsyncClient, cluster: tuple[Server, Server]
) -> None:
    assert await read(client) == ("replica", [])
    with frozen(cluster[1]):
        async with asyncio.timeout(20):
            assert await read(client) == ("primary", [])
            assert await read(client) == ("primary", [])


async def test_a_session_of_the_replica_refuses_writes_on_the_primary_too(
    notes: Any, cluster: tuple[Server, Server]
) -> None:
    primary, standby = cluster
    async with notes.primary, notes.replica:
        await primary.fetch("CREATE TABLE replicated_note ()")
        for server in standby, primary:
            await notes.replica.change_host(server.host)
            async with new_db_session_ctx():
                # Without the handler, which would go back to the standby.
                factory = await notes.replica.session_maker()
                with pytest.raises(DBAPIError, match="read-only transaction"):
                    async with factory() as session:
                        await session.execute(text("INSERT INTO replicated_note DEFAULT VALUES"))


async def test_a_request_that_wrote_nothing_gets_no_cookie(client: httpx.AsyncClient) -> None:
    assert (await client.get("/notes")).status_code == 200
    assert "position" not in client.cookies


async def test_whoever_has_no_position_reads_the_primary(
    client: httpx.AsyncClient,
    notes: Any,
    cluster: tuple[Server, Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def note_position() -> None:
        raise ConnectionResetError

    monkeypatch.setattr(notes, "note_position", note_position)
    async with replay_paused(cluster[1]):
        assert (await client.post("/notes/tea")).status_code == 201
        assert position_of(client, notes) == notes.UNKNOWN
        assert (await client.get("/notes")).json() == ["tea"]


async def test_a_position_that_was_read_before_the_commit_promises_nothing(
    client: httpx.AsyncClient, notes: Any, cluster: tuple[Server, Server]
) -> None:
    primary, standby = cluster
    async with new_db_session_ctx():
        session = await db_session(notes.primary)
        session.add(notes.Note(body="milk"))
        await session.flush()
        lsn = "SELECT CAST(pg_current_wal_insert_lsn() AS text)"
        too_early = (await session.execute(text(lsn))).scalar_one()
        await primary.fetch("CREATE TABLE another_transaction ()")
        await primary.fetch("DROP TABLE another_transaction")
        replayed = f"SELECT WHERE pg_last_wal_replay_lsn() >= '{too_early}'"
        await until(lambda: standby.fetch(replayed))
        await standby.fetch("SELECT pg_wal_replay_pause()")
    async with replay_paused(standby):
        assert await standby.fetch(replayed)
        cookie = {"Cookie": f"position={notes.signer.sign(too_early).decode()}"}
        assert (await client.get("/notes", headers=cookie)).json() == []


def test_one_command_starts_the_servers_and_stops_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_module("examples.read_replicas --port {port}", log) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            response = client.post("/notes/milk")
            assert (response.status_code, response.headers["served-by"]) == (201, "primary")
            response = client.get("/notes")
            assert (response.json(), response.headers["served-by"]) == (["milk"], "replica")
        servers = re.findall(r"^\w+: (postgresql:\S+) in (\S+)$", log.read_text(), re.MULTILINE)
        assert len(servers) == 2
    for url, directory in servers:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((make_url(url).host, make_url(url).port))
        assert not Path(directory).exists()


async def test_the_command_takes_the_servers_of_its_environment(
    cluster: tuple[Server, Server], tmp_path: Path
) -> None:
    primary, standby = cluster
    command = "examples.read_replicas --port {port}"
    log = tmp_path / "log"
    try:
        with running_module(command, log, PRIMARY_URL=primary.url, REPLICA_URL=standby.url) as port:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                assert (await client.post("/notes/tea")).status_code == 201
                assert await read(client) == ("replica", ["tea"])
        assert await primary.fetch("SELECT FROM replicated_note")
    finally:
        await primary.fetch("DROP TABLE replicated_note")
