"""The promise holds at every point where something can go wrong; each point is tried.

Each request is run as it is, with every fault; and with a setting of each other kind (another
driver, errors that are swallowed, a second engine in the session, a response that starts late,
BEGIN in flight, a lost COMMIT that is looked up), one request with one of that kind, and the next
request with the next.
`EVERY_SETTING=1` runs each with all of them, which takes twice the time.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import pytest
import stamina
from sqlalchemy import URL

from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from tests.helpers.bench import Bench, PostgresBench, Setting, SQLiteBench
from tests.helpers.cancelling import cancel_at
from tests.helpers.database import Database
from tests.helpers.late_start import Holding, Spawning
from tests.helpers.proxy import Fault
from tests.helpers.scenarios import (
    SCENARIOS,
    write_and_swallow,
    write_at_the_driver,
    write_on_two_engines,
    write_plainly,
)
from tests.helpers.serving import serve

PLAIN = Setting()
PSYCOPG = Setting("psycopg")
SWALLOWING = Setting("asyncpg", write_and_swallow)
AT_THE_DRIVER = Setting("asyncpg", write_at_the_driver)
AT_PSYCOPG = Setting("psycopg", write_at_the_driver, Spawning)
TWO_ENGINES = Setting("asyncpg", write_on_two_engines)
TWO_ENGINES_OF_PSYCOPG = Setting("psycopg", write_on_two_engines)
HOLDING = Setting("asyncpg", write_plainly, Holding)
SPAWNING = Setting("asyncpg", write_plainly, Spawning)
IN_FLIGHT = Setting(in_flight=True)
VERIFIED = Setting(verified=True)
VERIFIED_BY_PSYCOPG = Setting("psycopg", verified=True)
FAULTS = [*Fault, "terminated"]
LOST = [Fault.LOST_BEFORE, Fault.LOST_AFTER, "terminated"]

Case: TypeAlias = tuple[Setting, object]


def cases(*kinds: list[Case]) -> pytest.MarkDecorator:
    """Run a test with each scenario, in a setting and with a fault of each of these kinds."""
    every = "EVERY_SETTING" in os.environ
    return pytest.mark.parametrize(
        ("name", "setting", "fault"),
        [
            pytest.param(name, *case, id=f"{name}-{case[0]}-{getattr(case[1], 'name', case[1])}")
            for number, name in enumerate(SCENARIOS)
            for kind in kinds
            for case in (kind if every else [kind[number % len(kind)]])
        ],
    )


@contextmanager
def reported(
    bench: Bench, record_property: Callable[[str, object], None], caplog: pytest.LogCaptureFixture
) -> Generator[Bench]:
    """Count the points, and look for what was left to the garbage collector."""
    with stamina.set_testing(True, attempts=3):  # no pauses
        yield bench
    assert bench.points > 1
    record_property("fault points", bench.points)
    gc.collect()
    for record in caplog.records:
        assert "garbage collector" not in record.getMessage()
    messages = [record.getMessage() for record in caplog.get_records("call")]
    outcomes = {m.rpartition(": ")[2] for m in messages if "was lost during COMMIT" in m}
    assert outcomes <= {"committed", "aborted", "nothing to commit"}, "an outcome is unknown"


@pytest.fixture
def bench(
    name: str,
    setting: Setting,
    database_url: URL,
    database: Database,
    record_property: Callable[[str, object], None],
    caplog: pytest.LogCaptureFixture,
) -> Generator[Bench]:
    bench = PostgresBench(name, setting, database_url, database)
    with reported(bench, record_property, caplog):
        yield bench


@pytest.fixture
def sqlite_bench(
    name: str,
    setting: Setting,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    caplog: pytest.LogCaptureFixture,
) -> Generator[Bench]:
    with reported(SQLiteBench(name, setting, tmp_path), record_property, caplog) as bench:
        yield bench


async def run(app: ASGIApp, sent: list[Message]) -> None:
    """Call `app` without a server."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/",
        "headers": [],
        "query_string": b"",
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)


async def fail_each_in_its_turn(bench: Bench, fault: object) -> None:
    async with bench.connects() as connects:
        for number in itertools.count(1):
            if not bench.setting.in_flight:  # only a statement that is prepared takes BEGIN along
                await bench.close_idle(connects)  # so that connecting may fail, too
            tasks = asyncio.all_tasks()
            bench.fault = (number, fault)
            sent: list[Message] = []
            with suppress(Exception):
                await run(bench.app(connects), sent)
            calls = len(bench.calls)
            await bench.check(connects, sent, tasks)
            if calls < number:
                break


@cases(
    *([(PLAIN, fault)] for fault in FAULTS),
    [(PSYCOPG, Fault.ERROR), (PSYCOPG, Fault.LOST_AFTER)],
    [(SWALLOWING, Fault.ERROR), (AT_THE_DRIVER, Fault.ERROR), (AT_PSYCOPG, Fault.ERROR)],
    [(TWO_ENGINES, Fault.ERROR), (TWO_ENGINES_OF_PSYCOPG, Fault.ERROR)],
    [(HOLDING, Fault.ERROR), (SPAWNING, "terminated")],
    [(IN_FLIGHT, fault) for fault in FAULTS],
    [(setting, f) for f in LOST for setting in (VERIFIED, VERIFIED_BY_PSYCOPG)],
)
async def test_every_round_trip_fails_in_its_turn(bench: Bench, fault: object) -> None:
    await fail_each_in_its_turn(bench, fault)


@cases(
    [(PLAIN, "error"), (PLAIN, "ended")],
    [(SWALLOWING, "ended"), (AT_THE_DRIVER, "ended")],
    [(HOLDING, "error"), (SPAWNING, "ended")],
)
async def test_every_statement_of_sqlite_fails_in_its_turn(
    sqlite_bench: Bench, fault: object
) -> None:
    await fail_each_in_its_turn(sqlite_bench, fault)


async def cancel_at_each_suspension(bench: Bench, kind: str) -> None:
    async with bench.connects() as connects:
        for number in itertools.count(1):
            tasks = asyncio.all_tasks()
            sent: list[Message] = []
            suspensions = await cancel_at(number, run(bench.app(connects), sent), kind)
            await bench.check(connects, sent, tasks)
            if suspensions < number:
                break


@cases(
    [(PLAIN, "asyncio")],
    [(PLAIN, "anyio")],
    [(PSYCOPG, "asyncio"), (TWO_ENGINES, "asyncio"), (HOLDING, "anyio"), (SPAWNING, "asyncio")],
    [(IN_FLIGHT, "asyncio"), (VERIFIED, "asyncio")],
)
async def test_a_request_is_cancelled_at_every_suspension(bench: Bench, fault: str) -> None:
    await cancel_at_each_suspension(bench, fault)


@cases([(PLAIN, "hang-up"), (SPAWNING, "hang-up")])
@pytest.mark.usefixtures("fault")
async def test_a_client_hangs_up_at_every_step(bench: Bench) -> None:
    async with bench.connects() as connects:
        app = bench.app(connects)
        sent: list[Message] = []
        left, ended = asyncio.Event(), asyncio.Event()

        async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
            async def record(message: Message) -> None:
                # A BaseHTTPMiddleware completes the body of a client that has left, for nobody.
                if message["type"] == "http.response.start" or not left.is_set():
                    sent.append(message)
                await send(message)

            try:
                await app(scope, receive, record)
            finally:
                ended.set()

        async with serve(recorded, lifespan="off", log_level="critical") as port:
            for request in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"):
                tasks = asyncio.all_tasks()
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                writer.transport.abort()
                await bench.check(connects, sent, tasks)
            for number in itertools.count():
                sent.clear()
                left.clear()
                ended.clear()
                tasks = asyncio.all_tasks()
                await hang_up_at(number, port, bench, left)
                async with asyncio.timeout(10):
                    await ended.wait()
                calls = len(bench.calls)
                await bench.check(connects, sent, tasks)
                if calls < number:
                    break


async def hang_up_at(number: int, port: int, bench: Bench, left: asyncio.Event) -> None:
    """Send a request, and hang up at a round trip to the database; 0: before the first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def hang_up(call: int) -> None:
        if call == number:
            left.set()
            writer.transport.abort()

    bench.at_call = hang_up
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    if number == 0:
        await writer.drain()
        left.set()
        writer.transport.abort()
    with suppress(OSError):
        await reader.read()
    writer.transport.abort()
