"""Notes are written on the primary, and read on a replica as long as that serves."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import make_url

from tests.helpers.cluster import primary_and_standby
from tests.helpers.postgres import Server
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
        assert (await client.post("/notes/milk")).status_code == 201
        assert await read(client) == ("primary", ["milk"])
        assert await read(reader) == ("replica", [])
        assert notes.replica.host == standby.host
    await until(lambda: standby.fetch("SELECT FROM replicated_note"))

    # Once it has caught up, the replica serves the writer, too: without the primary.
    await notes.primary.close()
    assert await read(client) == ("replica", ["milk"])
    assert notes.primary.engine is None
    # Both are asked for something that their method does not tell.
    assert (await client.post("/reports")).json() == 1
    assert (await client.get("/notes/milk/take")).json() is True
    assert (await read(client))[1] == []


async def read(client: httpx.AsyncClient) -> tuple[str, list[str]]:
    """Return who has answered, and what."""
    response = await client.get("/notes")
    assert response.status_code == 200
    return response.headers["served-by"], response.json()


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


def test_one_command_starts_the_servers_and_stops_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_module("examples.read_replicas --port {port}", log) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            response = client.post("/notes/milk")
            assert response.status_code == 201
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
