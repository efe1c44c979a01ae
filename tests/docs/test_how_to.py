"""The programs of the how-to pages, run."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import stamina
from sqlalchemy import text
from sqlalchemy.exc import NoResultFound
from taskiq import InMemoryBroker
from websockets.asyncio.client import connect as connect_websocket

from context_async_sqlalchemy import db_session, new_db_session_ctx, retry_on_transient_error
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.programs import PROGRAMS, ROOT, Outside, until
from tests.helpers.serving import http_client, serve


def test_a_program_opens_nothing_when_it_is_imported(tmp_path: Path) -> None:
    code = f"""
import importlib
from tests.helpers.programs import connects_of
for name in {PROGRAMS}:
    connects = connects_of(importlib.import_module("examples.how_to." + name))
    # These make them in the lifespan, or when a request asks.
    assert connects or name in ("dependencies", "databases_per_tenant")
    assert all(connect.engine is None for connect in connects)
"""
    env = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path, env=env, timeout=60)
    assert len(PROGRAMS) >= 15
    assert list(tmp_path.iterdir()) == []


# Scripts and cron


async def run_script(url: str, *files: Path) -> tuple[int, str]:
    """Run the script as a process; return its exit status and what it wrote to stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "examples.how_to.script", *map(str, files)),
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


async def test_a_batch_that_fails_is_lost_alone(
    url: str, load: Callable[[str, str], Any], tmp_path: Path
) -> None:
    load("script", url)
    files = [tmp_path / name for name in ("mon.csv", "tue.csv", "wed.csv", "thu.csv")]
    files[0].write_text("tea,300\nmilk,90\n")
    files[1].write_text("tea,310\nbread\n")
    # The third is missing.
    files[3].write_text("milk,95\n")

    status, errors = await run_script(url, *files)
    assert status == 1
    assert [f"Nothing was imported from {file}" in errors for file in files] == [0, 1, 1, 0]
    prices = "SELECT article, cents FROM price ORDER BY article"
    assert await Outside(url).rows(prices) == [("milk", 95), ("tea", 300)]

    files[1].write_text("tea,310\nbread,250\n")
    assert await run_script(url, files[1]) == (0, "")
    assert await Outside(url).rows(prices) == [("bread", 250), ("milk", 95), ("tea", 310)]


async def test_a_script_without_a_database_fails() -> None:
    status, errors = await run_script("postgresql+asyncpg://u:secret@127.0.0.1:1/prices")
    assert status == 1
    assert "ConnectionRefusedError" in errors
    assert "secret" not in errors


# Queue workers


async def test_the_worker_does_what_was_committed(
    url: str, load: Callable[[str, str], Any]
) -> None:
    worker = load("worker", url)
    await worker.main()
    assert await Outside(url).rows("SELECT article FROM customer_order WHERE packed") == ["tea"]


@pytest_asyncio.fixture
async def worker(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program with its broker started, on each database."""
    worker = load("worker", url)
    async with started(worker):
        yield worker


@asynccontextmanager
async def started(worker: Any) -> AsyncGenerator[None]:
    await worker.broker.startup()
    yield
    await worker.broker.wait_all()
    assert connections_out(worker.connect) == 0
    await worker.broker.shutdown()


async def test_no_message_is_sent_for_a_row_that_is_rolled_back(
    worker: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    async def kick(message: Any) -> None:
        sent.append((message.task_name, await Outside(url).rows("SELECT id FROM customer_order")))

    monkeypatch.setattr(worker.broker, "kick", kick)
    with pytest.raises(ValueError, match="no tea"):
        async with new_db_session_ctx():
            await worker.place_order("tea")
            raise ValueError("no tea")
    assert sent == []
    async with new_db_session_ctx():
        await worker.place_order("milk")
        assert sent == []
    [(name, rows)] = sent
    assert name == "examples.how_to.worker:pack"
    assert len(rows) == 1, "the row is committed before the message is sent"


async def test_an_order_stays_if_its_message_cannot_be_sent(
    worker: Any, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def kick(_: Any) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(worker.broker, "kick", kick)
    async with new_db_session_ctx():
        await worker.place_order("tea")
    assert await Outside(url).rows("SELECT article FROM customer_order") == ["tea"]
    assert "A callback of on_commit failed" in caplog.text


async def test_a_task_that_raises_is_rolled_back_and_not_repeated(
    worker: Any, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = await worker.pack.kiq(4711)
    result = await task.wait_result(timeout=10)
    assert isinstance(result.error, NoResultFound)
    assert caplog.text.count("Exception found while executing function") == 1

    async with new_db_session_ctx():
        await worker.place_order("tea")
    await worker.broker.wait_all()
    [order] = await Outside(url).rows("SELECT id FROM customer_order WHERE packed")

    broker: InMemoryBroker = worker.broker

    @broker.task
    @retry_on_transient_error(attempts=5)
    async def unpack(order_id: int) -> None:
        session = await db_session(worker.connect)
        (await session.get_one(worker.Order, order_id)).packed = False
        await session.flush()
        raise ValueError("no hands")

    result = await (await unpack.kiq(order)).wait_result(timeout=10)
    assert isinstance(result.error, ValueError)
    assert await Outside(url).rows("SELECT id FROM customer_order WHERE packed") == [order]


async def test_a_task_is_done_again_when_the_connection_is_lost(
    postgresql: str, database: Database, load: Callable[[str, str], Any]
) -> None:
    worker = load("worker", postgresql)
    async with started(worker):
        outside = Outside(postgresql)
        async with outside.connection() as connection:
            insert = "INSERT INTO customer_order (article, packed) VALUES ('tea', false)"
            order = await connection.scalar(text(f"{insert} RETURNING id"))
        async with outside.connection() as connection:
            # So that the worker waits at a known statement.
            await connection.execute(text("SELECT * FROM customer_order FOR UPDATE"))
            task = await worker.pack.kiq(order)
            pid = await until(lambda: database.pid_of("UPDATE customer_order%"))
            await database.terminate(pid)
        result = await task.wait_result(timeout=10)
        assert result.error is None
        assert await outside.rows("SELECT id FROM customer_order WHERE packed") == [order]


# WebSockets


async def test_each_message_is_a_unit_of_work(
    url: str, load: Callable[[str, str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    program = load("websocket", url)
    notes = "SELECT body FROM how_to_note ORDER BY body"
    async with (
        serve(program.app, ws="wsproto") as port,
        connect_websocket(f"ws://127.0.0.1:{port}/notes") as ann,
        connect_websocket(f"ws://127.0.0.1:{port}/notes") as bob,
    ):
        for websocket, message, answer, stored in (
            (ann, "milk", "stored", ["milk"]),
            (ann, "tea\nmilk", "there already", ["milk"]),
            (bob, "bread\n\nbutter", "failed", ["milk"]),
            (bob, "x" * 10_001, "failed", ["milk"]),
            (bob, "bread\nbutter", "stored", ["bread", "butter", "milk"]),
            (ann, "tea", "stored", ["bread", "butter", "milk", "tea"]),
        ):
            await websocket.send(message)
            async with asyncio.timeout(10):
                assert await websocket.recv() == answer
            assert connections_out(program.connect) == 0
            assert await Outside(url).rows(notes) == stored
    assert caplog.text.count("ValueError: a note is empty") == 1


async def test_what_a_client_that_left_had_sent_is_stored(
    postgresql: str, database: Database, load: Callable[[str, str], Any]
) -> None:
    program = load("websocket", postgresql)
    outside = Outside(postgresql)
    async with serve(program.app, ws="wsproto") as port:
        async with (
            connect_websocket(f"ws://127.0.0.1:{port}/notes") as websocket,
            outside.connection() as connection,
        ):
            await connection.execute(text("LOCK TABLE how_to_note"))
            await websocket.send("milk")
            await until(lambda: database.pid_of("INSERT INTO how_to_note%"))
            websocket.transport.abort()
        await until(lambda: outside.rows("SELECT body FROM how_to_note"))
        await until(lambda: connections_out(program.connect) == 0)


# After the commit


class Mails(list[tuple[str, str]]):
    """What was sent, and what was in the database then."""

    def __init__(self, outside: Outside) -> None:
        super().__init__()
        self.members_then: list[Any] = []
        self.is_being_sent = asyncio.Event()
        self.may_be_sent = asyncio.Event()
        self.may_be_sent.set()
        self._outside = outside

    async def send(self, to: str, subject: str) -> None:
        self.is_being_sent.set()
        await self.may_be_sent.wait()
        self.members_then.append(await self._outside.rows("SELECT email FROM member"))
        self.append((to, subject))


@pytest.fixture
def members(url: str, load: Callable[[str, str], Any]) -> Any:
    """Return the program of the sign-ups, on each database."""
    return load("after_commit", url)


@pytest.fixture
def mails(members: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> Mails:
    mails = Mails(Outside(url))
    monkeypatch.setattr(members, "send_mail", mails.send)
    return mails


@pytest_asyncio.fixture
async def client(members: Any, mails: Mails) -> AsyncGenerator[httpx.AsyncClient]:
    async with http_client(members.app) as client:
        yield client


async def test_a_mail_is_sent_after_the_commit_and_before_the_response(
    client: httpx.AsyncClient, mails: Mails
) -> None:
    mails.may_be_sent.clear()
    request = asyncio.create_task(client.post("/members/ann"))
    async with asyncio.timeout(10):
        await mails.is_being_sent.wait()
    assert (await client.get("/openapi.json")).status_code == 200
    assert not request.done()
    mails.may_be_sent.set()
    assert (await request).status_code == 201
    assert mails == [("ann", "Welcome")]
    assert mails.members_then == [["ann"]]


async def test_no_mail_is_sent_when_the_commit_fails(
    client: httpx.AsyncClient, mails: Mails
) -> None:
    assert (await client.post("/members/ann")).status_code == 201
    assert (await client.post("/members/ann")).status_code == 409
    assert (await client.post("/members/ann/vouchers/10%25")).status_code == 409
    assert mails == [("ann", "Welcome")]


async def test_no_mail_is_sent_for_a_savepoint_that_is_undone(
    client: httpx.AsyncClient, mails: Mails, url: str
) -> None:
    for email in "ann", "bob":
        assert (await client.post(f"/members/{email}/vouchers/10%25")).status_code == 201
    assert mails == [("ann", "Welcome"), ("ann", "Your discount"), ("bob", "Welcome")]
    assert await Outside(url).rows("SELECT email FROM member ORDER BY email") == ["ann", "bob"]
    assert await Outside(url).rows("SELECT code FROM used_voucher") == ["10%"]


async def test_a_mail_that_fails_is_logged_and_the_member_stays(
    client: httpx.AsyncClient,
    members: Any,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def send_mail(_: str, __: str) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(members, "send_mail", send_mail)
    assert (await client.post("/members/ann")).status_code == 201
    assert await Outside(url).rows("SELECT email FROM member") == ["ann"]
    assert "A callback of on_commit failed" in caplog.text


async def test_a_mail_in_the_background_is_sent_after_the_response(
    client: httpx.AsyncClient, members: Any, mails: Mails
) -> None:
    await client.post("/members/ann")
    mails.may_be_sent.clear()
    assert (await client.delete("/members/ann")).status_code == 204
    assert mails == [("ann", "Welcome")]
    assert connections_out(members.connect) == 0
    mails.may_be_sent.set()
    await until(lambda: mails == [("ann", "Welcome"), ("ann", "Goodbye")])
    assert mails.members_then[-1] == []


# Retries


@pytest_asyncio.fixture
async def bank(postgresql: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the transfers, served, with accounts; and a client in it."""
    bank = load("retries", postgresql)
    async with http_client(bank.app) as bank.client:
        for owner in "landlord", "tenant":
            assert (await bank.client.put(f"/accounts/{owner}")).status_code == 200
        yield bank
        assert connections_out(bank.connect) == 0


@asynccontextmanager
async def conflict(postgresql: str, database: Database) -> AsyncGenerator[None]:
    """Make the block's two transfers wait for each other: they cannot both be first."""
    outside = Outside(postgresql)
    waiting = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND query LIKE 'UPDATE bank_account%'"
    )

    async def both_wait() -> bool:
        return len(await outside.rows(waiting)) == 2

    async with outside.connection() as connection:
        await connection.execute(text("SELECT * FROM bank_account FOR UPDATE"))
        yield
        await until(both_wait)


def count_retries(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.name == "stamina" for record in caplog.records)


async def balances(postgresql: str) -> Sequence[Any]:
    return await Outside(postgresql).rows("SELECT owner, balance FROM bank_account ORDER BY owner")


RENT = "/transfers?source=tenant&target=landlord&amount=800"


async def test_a_request_is_done_again_after_a_serialization_failure(
    bank: Any, postgresql: str, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with conflict(postgresql, database):
        requests = [asyncio.create_task(bank.client.post(RENT)) for _ in range(2)]
    assert [(await request).status_code for request in requests] == [200, 200]
    assert await balances(postgresql) == [("landlord", 1600), ("tenant", -1600)]
    assert count_retries(caplog) >= 1
    # The attempt that was undone has told nobody.
    assert caplog.text.count("landlord received 800") == 2


async def test_the_second_transfer_keeps_the_contact_of_the_first(
    bank: Any, postgresql: str
) -> None:
    for _ in range(2):
        assert (await bank.client.post(RENT)).status_code == 200
    contacts = await Outside(postgresql).rows("SELECT owner, name FROM contact")
    assert contacts == [("tenant", "landlord")]
    assert await balances(postgresql) == [("landlord", 1600), ("tenant", -1600)]


async def test_a_job_is_done_again_after_a_serialization_failure(
    bank: Any, postgresql: str, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with conflict(postgresql, database):
        jobs = [asyncio.create_task(bank.pay_rent()) for _ in range(2)]
    await asyncio.gather(*jobs)
    assert await balances(postgresql) == [("landlord", 1600), ("tenant", -1600)]
    assert count_retries(caplog) >= 1
    assert caplog.text.count("landlord received 800") == 2


async def test_nothing_is_done_again_while_stamina_is_testing(
    bank: Any, postgresql: str, database: Database
) -> None:
    with stamina.set_testing(True):
        async with conflict(postgresql, database):
            requests = [asyncio.create_task(bank.client.post(RENT)) for _ in range(2)]
        assert sorted([(await request).status_code for request in requests]) == [200, 500]
    assert await balances(postgresql) == [("landlord", 800), ("tenant", -800)]


async def test_the_transfers_work_on_sqlite(
    tmp_path: Path, load: Callable[[str, str], Any]
) -> None:
    bank = load("retries", f"sqlite+aiosqlite:///{tmp_path / 'bank.db'}")
    async with http_client(bank.app) as client:
        for owner in "landlord", "tenant":
            assert (await client.put(f"/accounts/{owner}")).status_code == 200
        responses = await asyncio.gather(*(client.post(RENT) for _ in range(4)))
        assert {response.status_code for response in responses} == {200}
        assert await balances(bank.DATABASE_URL) == [("landlord", 3200), ("tenant", -3200)]
