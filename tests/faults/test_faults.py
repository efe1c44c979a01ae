"""The promise holds at every point where something can go wrong; each point is tried."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import stamina
from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import URL
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    init_db_session_ctx,
    new_non_ctx_session,
    on_commit,
    reset_db_session_ctx,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import add, respond
from tests.helpers.cancelling import cancel_at
from tests.helpers.database import Database, assert_clean, make_connect
from tests.helpers.proxy import TASK_NAME, Call, Fault, proxy
from tests.helpers.serving import serve

MORE = {"type": "http.response.body", "body": b"x", "more_body": True}
START = {"type": "http.response.start", "status": 200, "headers": []}


@dataclass
class Rows:
    """What a scenario writes.

    Attributes:
        promised: The rows that are stored if the client was told 2xx.
        promised_by_body: The rows that are stored if the client has the whole body.
        together: Sets of rows that are stored all together or not at all.
        first: The row that is stored if any other is.
    """

    promised: set[str]
    promised_by_body: set[str] = field(default_factory=set)
    together: list[set[str]] = field(default_factory=list)
    first: str | None = None


@dataclass
class Scenario:
    """A request."""

    make_app: Callable[[DBConnect, DBConnect], ASGIApp]
    rows: Rows


SCENARIOS: dict[str, Scenario] = {}


def scenario(rows: Rows, **options: Any) -> Callable[[Callable[..., Awaitable[None]]], None]:
    """Register a function that handles a request as a scenario."""

    def register(handle: Callable[..., Awaitable[None]]) -> None:
        def make_app(connect: DBConnect, second: DBConnect) -> ASGIApp:
            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await handle(connect, second, send)

            return ASGIHTTPDBSessionMiddleware(app, **options)

        SCENARIOS[handle.__name__] = Scenario(make_app, rows)

    return register


@scenario(Rows(promised={"a", "b"}, together=[{"a", "b"}]))
async def plain_write(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await add(connect, "b")
    await respond(send)


@scenario(Rows(promised={"a", "b"}))
async def two_connects(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await add(second, "b")
    await respond(send)


@scenario(Rows(promised={"a"}, promised_by_body={"b", "c"}, together=[{"b", "c"}]))
async def streamed_body(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await send(START.copy())
    for name in "bc":
        await add(connect, name)
        await send(MORE.copy())
    await send({"type": "http.response.body"})


@scenario(Rows(promised={"a"}))
async def background_task(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await respond(send)
    await add(connect, "b")


@scenario(Rows(promised={"a", "b", "c"}, together=[{"a", "b"}]))
async def atomic_block(connect: DBConnect, _: DBConnect, send: Send) -> None:
    async with atomic_db_session(connect):
        await add(connect, "a")
        await add(connect, "b")
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a", "b", "c"}))
async def gathered_contexts(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await asyncio.gather(run_in_new_ctx(add, connect, "a"), run_in_new_ctx(add, second, "b"))
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a", "c"}))
async def early_commit_and_close(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await commit_db_session(connect)
    await add(connect, "not committed")
    await close_db_session(connect)
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised=set()))
async def two_connects_rolled_back(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await add(connect, "not committed")
    await add(second, "not committed either")
    await respond(send, 400)


@scenario(Rows(promised={"c"}))
async def two_connects_closed(connect: DBConnect, second: DBConnect, send: Send) -> None:
    token = init_db_session_ctx(force=True)
    try:
        await add(connect, "not committed")
        await add(second, "not committed either")
    finally:
        await reset_db_session_ctx(token)
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a", "c"}, together=[{"a", "c"}]))
async def savepoint_undone(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    with suppress(ValueError):
        async with atomic_db_session(connect, "savepoint"):
            await add(connect, "not committed")
            raise ValueError
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a"}, first="a"))
async def callbacks_after_commit(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await add(connect, "a")
    on_commit(connect, partial(add, connect, "called"))
    on_commit(connect, partial(add, second, "called too"))
    await respond(send)


@scenario(Rows(promised={"a", "b"}, together=[{"a", "b"}]), attempts=3)
async def tried_again(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await add(connect, "b")
    await respond(send)


def make_fastapi_app(connect: DBConnect, _: DBConnect) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    async def dependency() -> AsyncGenerator[None]:
        await add(connect, "a")
        yield
        # FastAPI runs this before the response or after it, depending on its version.
        await add(connect, "c")

    @app.get("/", dependencies=[Depends(dependency)])
    async def endpoint() -> JSONResponse:
        await add(connect, "b")
        return JSONResponse({})

    return app


SCENARIOS["yield_dependency"] = Scenario(
    make_fastapi_app, Rows(promised={"a", "b"}, together=[{"a", "b"}])
)


def make_starlette_app(connect: DBConnect, _: DBConnect) -> Starlette:
    async def endpoint(__: Request) -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            for name in "bc":
                await add(connect, name)
                yield name

        await add(connect, "a")
        return StreamingResponse(body(), background=BackgroundTask(add, connect, "d"))

    app = Starlette(routes=[Route("/", endpoint)])
    add_starlette_http_db_session_middleware(app)
    return app


SCENARIOS["streaming_response"] = Scenario(
    make_starlette_app,
    Rows(promised={"a"}, promised_by_body={"b", "c"}, together=[{"b", "c"}]),
)

every_scenario = pytest.mark.parametrize("name", SCENARIOS)


class Bench:
    """Runs a scenario repeatedly, each time with a different fault."""

    def __init__(self, url: URL, database: Database) -> None:
        self._url = url
        self._database = database
        self.calls: list[Call] = []
        self.fault: tuple[int, Fault | str] | None = None
        self.at_call: Callable[[int], None] = lambda _: None
        self.points = 0

    @asynccontextmanager
    async def connects(self) -> AsyncGenerator[tuple[DBConnect, DBConnect]]:
        """Make two connects through the proxy."""
        host, port = self._url.host, self._url.port
        assert host is not None
        assert port is not None
        async with proxy(host, port, self._decide) as proxy_port:
            url = self._url.set(host="127.0.0.1", port=proxy_port)
            first, second = make_connect(url), make_connect(url)
            try:
                for connect in (first, second):
                    # Get the queries that SQLAlchemy sends once per engine out of the way.
                    async with new_non_ctx_session(connect) as session:
                        await session.connection()
                    assert connect.engine is not None
                    await connect.engine.dispose()
                self.calls.clear()
                yield first, second
            finally:
                self.fault = None
                await first.close()
                await second.close()

    async def _decide(self, call: Call) -> Fault | None:
        self.calls.append(call)
        number = len(self.calls)
        self.at_call(number)
        if self.fault is None or number != self.fault[0]:
            return None
        fault = self.fault[1]
        if isinstance(fault, Fault):
            return fault
        if call.pid:
            await self._database.terminate(call.pid)
        return None

    async def check(
        self,
        scenario: Scenario,
        connects: tuple[DBConnect, DBConnect],
        sent: list[Message],
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        """Check the promise after one run."""
        self.points += 1
        self.fault, self.at_call = None, lambda _: None
        if left := {task for task in asyncio.all_tasks() - tasks if task.get_name() != TASK_NAME}:
            # When a task in a gather() fails, its siblings go on.
            _, left = await asyncio.wait(left, timeout=5)
        assert not left, "a task is left over"
        names = set(await self._database.names())
        told_success = any(m.get("status") == 200 for m in sent)
        whole_body = any(m["type"] == "http.response.body" and not m.get("more_body") for m in sent)
        if told_success:
            assert scenario.rows.promised <= names, "told 2xx, and it is not there"
        if whole_body and told_success:
            assert scenario.rows.promised_by_body <= names, "told all, and it is not there"
        if not any(call.statement.startswith("COMMIT") for call in self.calls):
            assert not names, "nothing was committed, and something is there"
        assert not names & {"not committed", "not committed either"}
        assert not names or scenario.rows.first in {None, *names}
        for group in scenario.rows.together:
            assert group & names in (set(), group), "a transaction was torn"

        for connect in connects:
            await assert_clean(connect, self._database)
        await self._database.empty()
        for connect in connects:
            after = await run(SCENARIOS["plain_write"].make_app(connect, connect))
            assert after[0]["status"] == 200, "the next request does not work"
            assert await self._database.names() == ["a", "b"]
            await self._database.empty()
        self.calls.clear()


@pytest.fixture
def bench(
    database_url: URL,
    database: Database,
    record_property: Callable[[str, object], None],
    caplog: pytest.LogCaptureFixture,
) -> Generator[Bench]:
    bench = Bench(database_url, database)
    with stamina.set_testing(True, attempts=3):  # no pauses
        yield bench
    assert bench.points > 1
    record_property("fault points", bench.points)
    gc.collect()
    for record in caplog.records:
        assert "garbage collector" not in record.getMessage()


async def run(app: ASGIApp, sent: list[Message] | None = None) -> list[Message]:
    """Call `app` without a server; return what it sent."""
    sent = [] if sent is None else sent
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
    return sent


@every_scenario
@pytest.mark.parametrize("fault", [*Fault, "terminated"])
async def test_every_round_trip_fails_in_its_turn(
    bench: Bench, name: str, fault: Fault | str
) -> None:
    scenario = SCENARIOS[name]
    for number in itertools.count(1):
        async with bench.connects() as connects:
            tasks = asyncio.all_tasks()
            bench.fault = (number, fault)
            sent: list[Message] = []
            with suppress(Exception):
                await run(scenario.make_app(*connects), sent)
            calls = len(bench.calls)
            await bench.check(scenario, connects, sent, tasks)
        if calls < number:
            break


@every_scenario
@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_a_request_is_cancelled_at_every_suspension(
    bench: Bench, name: str, kind: str
) -> None:
    scenario = SCENARIOS[name]
    async with bench.connects() as connects:
        for number in itertools.count(1):
            tasks = asyncio.all_tasks()
            sent: list[Message] = []
            suspensions = await cancel_at(number, run(scenario.make_app(*connects), sent), kind)
            await bench.check(scenario, connects, sent, tasks)
            if suspensions < number:
                break


@every_scenario
async def test_a_client_hangs_up_at_every_step(bench: Bench, name: str) -> None:
    scenario = SCENARIOS[name]
    async with bench.connects() as connects:
        app = scenario.make_app(*connects)
        sent: list[Message] = []
        ended = asyncio.Event()

        async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
            async def record(message: Message) -> None:
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
                await bench.check(scenario, connects, sent, tasks)
            for number in itertools.count():
                sent.clear()
                ended.clear()
                tasks = asyncio.all_tasks()
                await hang_up_at(number, port, bench)
                async with asyncio.timeout(10):
                    await ended.wait()
                calls = len(bench.calls)
                await bench.check(scenario, connects, sent, tasks)
                if calls < number:
                    break


async def hang_up_at(number: int, port: int, bench: Bench) -> None:
    """Send a request, and hang up at a round trip to the database; 0: before the first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def hang_up(call: int) -> None:
        if call == number:
            writer.transport.abort()

    bench.at_call = hang_up
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    if number == 0:
        await writer.drain()
        writer.transport.abort()
    with suppress(OSError):
        await reader.read()
    writer.transport.abort()
