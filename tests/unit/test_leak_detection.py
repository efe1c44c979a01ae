"""Leak detection: a warning when the session of a context holds a connection for long."""

# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import asyncio
import gc
import logging
import re
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Annotated, Any
from weakref import ref

import pytest
import pytest_asyncio
from anyio import from_thread, to_thread
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    commit_after_response,
    commit_db_session,
    db_session,
    init_db_session_ctx,
    new_db_session_ctx,
    on_commit,
)
from context_async_sqlalchemy._engine.release import close_sessions
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from tests.helpers.asgi import app_of, call, http_scope
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.programs import until
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.serving import http_client

THRESHOLD = 0.2  # seconds; what is quick takes a hundredth of it


async def use(connect: DBConnect) -> AsyncSession:
    """Take a connection."""
    session = await db_session(connect)
    await session.execute(text("SELECT 1"))
    return session


MADE_AT = f"made at {__file__}:{use.__code__.co_firstlineno + 2}."


@asynccontextmanager
async def watched(url: URL, **options: Any) -> AsyncGenerator[DBConnect]:
    options = {"leak_detection_threshold": THRESHOLD} | options
    async with DBConnect.from_url(url, **options) as connect:
        yield connect
        assert connections_out(connect) == 0


@pytest_asyncio.fixture
async def connect(database_url: URL, database: Database) -> AsyncGenerator[DBConnect]:
    async with watched(database_url) as connect:
        yield connect


class Log:
    """What was warned of.

    Attributes:
        references: The connects of `has_only`, whose warnings are left out.
    """

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self.references: list[str] = []

    @property
    def warnings(self) -> list[str]:
        return [w for w in self._messages() if not w.startswith(tuple(self.references))]

    def _messages(self) -> list[str]:
        records = self._caplog.records
        ours = [r for r in records if r.name == "context_async_sqlalchemy"]
        return [r.getMessage() for r in ours if r.levelno == logging.WARNING]

    async def wait_for(self, count: int = 1) -> str:
        """Wait until there are as many warnings, and return the last one."""
        await until(lambda: len(self.warnings) >= count)
        assert len(self.warnings) == count
        return self.warnings[-1]

    async def has_only(self, *parts: str) -> None:
        """Check that nothing held by now is warned of, but for one warning for each of `parts`."""
        # Timers are called in order: whoever takes a connection now is warned of after the others.
        async with watched(URL.create("sqlite")) as last, new_db_session_ctx():
            self.references.append(repr(last))
            await use(last)
            await until(lambda: any(w.startswith(repr(last)) for w in self._messages()))
        assert len(self.warnings) == len(parts)
        for part, warning in zip(parts, self.warnings, strict=True):
            assert part in warning


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.WARNING, "context_async_sqlalchemy")
    return Log(caplog)


# Who is named


async def test_a_slow_request_is_named_while_it_holds_and_a_quick_one_is_not(
    connect: DBConnect, log: Log
) -> None:
    release = asyncio.Event()

    async def handler(scope: Scope) -> int:
        await use(connect)
        if scope["path"] != "/quick":
            await release.wait()
        return 200

    async with http_client(app_of(handler)) as client:
        await client.get("/quick")
        slow = asyncio.create_task(client.post("/slow/ü%0A?token=secret"))
        warning = await log.wait_for()
        assert connections_out(connect) == 1
        release.set()
        assert (await slow).status_code == 200
    assert re.match(rf"{connect!r}: a connection has been held for \d\.\d\d seconds, by ", warning)
    assert r"by the request POST '/slow/ü\n'; " in warning
    assert MADE_AT in warning


def add_dispatch(app: FastAPI) -> None:
    app.middleware("http")(fastapi_http_db_session_middleware)


@pytest.mark.parametrize("add", [add_fastapi_http_db_session_middleware, add_dispatch])
async def test_a_streamed_body_that_reads_a_cursor_is_named(
    connect: DBConnect, log: Log, add: Callable[[FastAPI], None]
) -> None:
    app, release = FastAPI(), asyncio.Event()
    add(app)

    @app.get("/numbers")
    async def numbers() -> StreamingResponse:
        commit_after_response()
        session = await use(connect)
        rows = await session.stream(text("SELECT generate_series(1, 3)"))

        async def body() -> AsyncGenerator[str]:
            async for (number,) in rows:
                yield str(number)
                await release.wait()

        return StreamingResponse(body())

    async with http_client(app) as client, client.stream("GET", "/numbers?from=1") as response:
        assert response.status_code == 200
        warning = await log.wait_for()
        release.set()
        assert await response.aread() == b"123"
    assert "by the request GET '/numbers'; " in warning
    assert MADE_AT in warning


async def test_a_background_task_is_named_and_the_wait_before_it_is_not(
    connect: DBConnect, log: Log
) -> None:
    app, begin, release = FastAPI(), asyncio.Event(), asyncio.Event()
    add_fastapi_http_db_session_middleware(app)

    async def work() -> None:
        await begin.wait()
        await use(connect)
        await release.wait()

    @app.post("/orders")
    async def order(tasks: BackgroundTasks) -> None:
        await use(connect)
        tasks.add_task(work)

    async with http_client(app) as client:
        assert (await client.post("/orders")).status_code == 200
        await log.has_only()
        begin.set()
        await log.has_only("by the request POST '/orders'; ")
        release.set()


@pytest.mark.parametrize("manage_transactions", [True, False])
async def test_of_a_dependency_the_endpoint_is_named(
    connect: DBConnect, log: Log, manage_transactions: bool
) -> None:
    app, release = FastAPI(), asyncio.Event()
    dependency = DBSessionDependency(connect, manage_transactions=manage_transactions)

    @app.get("/report")
    async def report(session: Annotated[AsyncSession, Depends(dependency)]) -> None:
        assert await use(connect) is session
        await release.wait()

    async with http_client(app) as client:
        task = asyncio.create_task(client.get("/report?key=secret"))
        warning = await log.wait_for()
        release.set()
        assert (await task).status_code == 200
    assert "by the request GET '/report'; " in warning
    assert f"for the endpoint {__name__}.{report.__qualname__}." in warning


async def test_outside_of_a_request_the_line_is_named(connect: DBConnect, log: Log) -> None:
    async with new_db_session_ctx():
        await use(connect)
        warning = await log.wait_for()
    assert "outside of a request; " in warning
    assert MADE_AT in warning


async def atomically(connect: DBConnect, log: Log) -> None:
    async with atomic_db_session(connect) as session:
        await session.execute(text("SELECT 1"))
        await log.wait_for()


async def in_time(connect: DBConnect, log: Log) -> None:
    session = await asyncio.wait_for(db_session(connect), 10)
    await session.execute(text("SELECT 1"))
    await log.wait_for()


# Python 3.11 runs it in a task of its own.
with_wait_for = pytest.mark.skipif(sys.version_info < (3, 12), reason="makes a task")


@pytest.mark.parametrize("ask", [atomically, pytest.param(in_time, marks=with_wait_for)])
async def test_what_stands_between_is_not_taken_for_the_line(
    connect: DBConnect, log: Log, ask: FunctionType
) -> None:
    async with new_db_session_ctx():
        await ask(connect, log)
    assert f"{__file__}:{ask.__code__.co_firstlineno + 1}." in log.warnings[0]


@pytest.mark.parametrize("mode", [True, "snapshot"])
async def test_a_read_only_session_is_watched_too_and_gives_its_connection_back_as_it_says(
    connect: DBConnect, log: Log, mode: Any
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect, read_only=mode)
        line = sys._getframe().f_lineno - 1
        await session.execute(text("SELECT 1"))
        warning = await log.wait_for()
        assert warning.startswith(repr(connect))
        assert f"made at {__file__}:{line}." in warning
        assert "await session.commit()" in warning
        await session.commit()
        assert connections_out(connect) == 0
    await log.has_only("made at")


async def test_a_request_that_reads_only_is_named(connect: DBConnect, log: Log) -> None:
    async def handler(_: Scope) -> int:
        await use(connect)
        await log.wait_for()
        return 200

    await call(app_of(handler, read_only_methods={"GET"}), http_scope("/slow"))
    await log.has_only("by the request GET '/slow'")
    assert MADE_AT in log.warnings[0]


async def in_a_gather(connect: DBConnect) -> AsyncSession:
    [session] = await asyncio.gather(db_session(connect))
    return session


async def in_a_thread(connect: DBConnect) -> AsyncSession:
    return await to_thread.run_sync(from_thread.run, db_session, connect)


@pytest.mark.parametrize("ask", [in_a_gather, in_a_thread])
async def test_a_session_asked_for_by_a_task_of_its_own_has_no_line(
    connect: DBConnect, log: Log, ask: Callable[[DBConnect], Awaitable[AsyncSession]]
) -> None:
    async with new_db_session_ctx():
        session = await ask(connect)
        await session.execute(text("SELECT 1"))
        assert "its session was made in a task of its own." in await log.wait_for()


async def test_no_password_is_shown(database_url: URL, database: Database, log: Log) -> None:
    host = database_url.set(password="hunter2").render_as_string(hide_password=False)

    async with DBConnect(
        create_async_engine, async_sessionmaker, host, leak_detection_threshold=THRESHOLD
    ) as connect:

        async def handler(_: Scope) -> int:
            await use(connect)
            await log.wait_for()
            return 200

        await call(app_of(handler), {**http_scope(), "query_string": b"password=hunter2"})
    assert "hunter2" not in log.warnings[0]


async def test_the_warning_has_the_context_variables_of_the_request(
    connect: DBConnect, caplog: pytest.LogCaptureFixture, log: Log
) -> None:
    trace: ContextVar[str] = ContextVar("trace", default="none")
    traces = []

    def note(_: logging.LogRecord) -> bool:
        traces.append(trace.get())
        return True

    caplog.handler.addFilter(note)
    async with new_db_session_ctx():
        trace.set("4bf92f35")
        await use(connect)
        await log.wait_for()
    assert traces == ["4bf92f35"]


# What a holding is


async def test_a_holding_is_warned_of_once_and_the_next_one_anew(
    connect: DBConnect, database_url: URL, log: Log
) -> None:
    other = create_async_engine(database_url)
    async with new_db_session_ctx():
        session = await use(connect)
        await log.wait_for(1)
        # The same transaction: a savepoint, and another database of the session.
        async with atomic_db_session(connect, "savepoint"):
            await use(connect)
        await session.execute(text("SELECT 1"), bind_arguments={"bind": other.sync_engine})
        await log.has_only("held")
        await commit_db_session(connect)
        await use(connect)
        await log.has_only("held", "held")
    await other.dispose()


async def test_after_a_savepoint_the_connection_is_still_held(connect: DBConnect, log: Log) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        async with session.begin_nested():
            await use(connect)
        await log.wait_for()
        assert connections_out(connect) == 1


async def test_autocommit_holds_a_connection_too(
    database_url: URL, database: Database, log: Log
) -> None:
    async with (
        watched(database_url, isolation_level="AUTOCOMMIT") as connect,
        new_db_session_ctx(),
    ):
        await use(connect)
        await log.wait_for()
        assert connections_out(connect) == 1


async def test_a_blocked_event_loop_is_told_at_the_end(
    database_url: URL, database: Database, log: Log
) -> None:
    async with (
        watched(database_url, isolation_level="AUTOCOMMIT") as connect,
        new_db_session_ctx(),
    ):
        session = await use(connect)
        time.sleep(2 * THRESHOLD)  # noqa: ASYNC251
        await session.rollback()  # which sends nothing
        assert len(log.warnings) == 1
    await log.has_only("held")


async def test_callbacks_after_the_commit_hold_nothing(connect: DBConnect, log: Log) -> None:
    async with new_db_session_ctx():
        on_commit(connect, log.has_only)
        await use(connect)
        await commit_db_session(connect)
    assert log.warnings == []  # nor has the callback failed


async def test_a_transaction_whose_end_failed_holds_nothing(
    database_url: URL, database: Database, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    fails = False

    async def decide(call: Call) -> Fault | None:
        return Fault.ERROR if fails and call.statement.startswith("ROLLBACK") else None

    assert database_url.host is not None
    async with (
        proxy(database_url.host, database_url.port or 5432, decide) as port,
        watched(database_url.set(host="127.0.0.1", port=port)) as connect,
        new_db_session_ctx(),
    ):
        session = await use(connect)
        fails = True
        await close_sessions([session])  # which discards the connection then
        assert "failed to close" in caplog.text
        await log.has_only()
        await session.execute(text("SELECT 1"))
        await close_sessions([session])
        await session.execute(text("SELECT 1"))
        await log.has_only("held")
        fails = False
        await session.close()


# What it leaves behind


async def test_a_session_that_has_ended_is_not_kept_by_its_timer(
    database_url: URL, database: Database
) -> None:
    async with watched(database_url, leak_detection_threshold=3600) as connect:
        await connect.ping()  # asyncpg keeps the context variables of whoever opens a connection
        # The loop lets go of a timer that was cancelled as soon as it is the next one.
        before = asyncio.get_running_loop().call_later(1800, print)

        async def work() -> ref[AsyncSession]:
            async with new_db_session_ctx():
                return ref(await use(connect))

        session = await asyncio.create_task(work())
        gc.collect()
        assert session() is None
        before.cancel()


def test_a_transaction_may_outlive_its_loop(
    database_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    connect = DBConnect.from_url(database_url, leak_detection_threshold=3600)

    async def begin() -> AsyncSession:
        init_db_session_ctx()
        session = await use(connect)
        connection = await (await session.connection()).get_raw_connection()
        assert connection.driver_connection is not None
        await connection.driver_connection.close()
        return session

    session = asyncio.run(begin())
    asyncio.run(session.invalidate())
    assert not session.in_transaction()
    assert caplog.text == ""


# The option


async def test_nothing_is_listened_to_by_default(database_url: URL, database: Database) -> None:
    def listeners(session: AsyncSession) -> int:
        dispatch: Any = session.sync_session.dispatch
        return sum(len(getattr(dispatch, f"after_{name}")) for name in ("begin", "transaction_end"))

    counts = []
    for threshold in (None, THRESHOLD):
        async with (
            watched(database_url, leak_detection_threshold=threshold) as connect,
            new_db_session_ctx(),
        ):
            counts.append(listeners(await db_session(connect)))
    assert counts == [0, 2]
    assert DBConnect.from_url(database_url).leak_detection_threshold is None
    assert DBConnect(create_async_engine, async_sessionmaker).leak_detection_threshold is None


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), float("inf"), "5"])
def test_the_threshold_is_a_positive_number(threshold: Any) -> None:
    message = "leak_detection_threshold must be a positive number of seconds"
    with pytest.raises(ValueError, match=message):
        DBConnect.from_url("sqlite://", leak_detection_threshold=threshold)
    with pytest.raises(ValueError, match=message):
        DBConnect(create_async_engine, async_sessionmaker, leak_detection_threshold=threshold)
