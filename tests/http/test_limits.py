"""A request is stopped at its deadline, or when its client leaves, and nothing of it is stored."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sqlite3
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from packaging.version import Version
from sqlalchemy import URL, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from context_async_sqlalchemy import DBConnect, db_session, on_commit
from context_async_sqlalchemy._http.limits import _here
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.asgi_utils import (
    ASGIHTTPDBSessionMiddleware,
    RequestLimitsMiddleware,
    deadline_settings,
    set_deadline,
)
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import add, http_scope, respond
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, assert_clean
from tests.helpers.late_start import Buffering, Holding, Spawning
from tests.helpers.models import Item
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.servers import SERVERS, running_server
from tests.helpers.serving import http_client, serve

Handler = Callable[[Request], Awaitable[Any]]


class Passing:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Copying(Passing):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(dict(scope), receive, send)


SLEEP = text("SELECT pg_sleep(30)")
SHORT = 0.2


def app_of(
    handler: Handler,
    *middlewares: Any,
    attempts: int = 1,
    before_commit: Any = None,
    **limits: Any,
) -> Starlette:
    async def endpoint(request: Request) -> Response:
        response = await handler(request)
        return response if isinstance(response, Response) else PlainTextResponse("done")

    app = Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])
    for middleware in middlewares:
        app.add_middleware(middleware)
    add_starlette_http_db_session_middleware(app, before_commit, attempts=attempts)
    app.add_middleware(RequestLimitsMiddleware, **limits)
    return app


async def answer_of(app: Any, method: str = "GET", **options: Any) -> tuple[int, str]:
    async with http_client(app, lifespan="off") as client, asyncio.timeout(15):
        response = await client.request(method, "/", **options)
    return response.status_code, response.text


# Deadlines


@pytest.mark.parametrize("middlewares", [[], [Holding], [Spawning, GZipMiddleware]])
async def test_a_request_is_stopped_in_the_middle_of_a_statement(
    connect: DBConnect, database: Database, middlewares: list[Any]
) -> None:
    async def handler(_: Request) -> None:
        session = await add(connect, "a")
        await session.execute(SLEEP)

    assert await answer_of(app_of(handler, *middlewares, timeout=SHORT)) == (504, "Gateway Timeout")
    await database.is_quiet()
    assert await database.names() == []
    await assert_clean(connect, database)


async def test_a_request_is_stopped_while_it_waits_for_a_connection(
    database_url: URL, database: Database
) -> None:
    async with DBConnect.from_url(database_url, pool_size=1, max_overflow=0) as connect:
        async with await connect.create_session() as other:
            await other.execute(text("SELECT 1"))

            async def handler(_: Request) -> None:
                await add(connect, "a")

            assert (await answer_of(app_of(handler, timeout=SHORT)))[0] == 504
        assert connections_out(connect) == 0
    assert await database.names() == []


async def test_a_request_of_many_short_statements_is_stopped(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Request) -> None:
        for number in range(1000):
            session = await add(connect, str(number))
            await session.execute(text("SELECT pg_sleep(0.05)"))

    assert (await answer_of(app_of(handler, timeout=SHORT)))[0] == 504
    await database.is_quiet()
    assert await database.names() == []


async def test_a_request_that_is_quick_is_not_stopped(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Request) -> None:
        await add(connect, "a")

    assert await answer_of(app_of(handler, timeout=30.0)) == (200, "done")
    assert await database.names() == ["a"]


async def test_the_application_answers_as_it_answers_a_504(connect: DBConnect) -> None:
    async def sleep() -> None:
        await add(connect, "a")
        await asyncio.sleep(30)

    def make() -> FastAPI:
        app = FastAPI()
        app.add_api_route("/", sleep)
        add_starlette_http_db_session_middleware(app)
        app.add_middleware(RequestLimitsMiddleware, timeout=SHORT)
        return app

    assert await answer_of(make()) == (504, '{"detail":"Gateway Timeout"}')
    own = make()

    @own.exception_handler(504)
    async def answer(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"too": "slow"}, error.status_code)

    assert await answer_of(own) == (504, '{"too":"slow"}')


async def test_any_asgi_application_answers_504(connect: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (await add(connect, "a")).execute(SLEEP)

    stopped = RequestLimitsMiddleware(ASGIHTTPDBSessionMiddleware(app), timeout=SHORT)
    assert await answer_of(stopped) == (504, "Gateway Timeout")
    await database.is_quiet()
    inside = ASGIHTTPDBSessionMiddleware(RequestLimitsMiddleware(app, timeout=SHORT))
    assert await answer_of(inside) == (504, "Gateway Timeout")
    await database.is_quiet()
    assert await database.names() == []


async def test_a_request_is_not_repeated_after_its_deadline(
    connect: DBConnect, database: Database
) -> None:
    calls = 0

    async def handler(_: Request) -> None:
        nonlocal calls
        calls += 1
        await (await add(connect, "a")).execute(SLEEP)

    assert (await answer_of(app_of(handler, attempts=3, timeout=SHORT)))[0] == 504
    assert calls == 1
    await database.is_quiet()


@pytest.mark.usefixtures("no_pauses")
async def test_all_attempts_have_one_deadline(connect: DBConnect, database: Database) -> None:
    calls = 0

    async def handler(_: Request) -> None:
        nonlocal calls
        calls += 1
        await add(connect, "a")
        await asyncio.sleep(0.1)
        raise_serialization = text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
        await (await db_session(connect)).execute(raise_serialization)

    assert (await answer_of(app_of(handler, attempts=3, timeout=0.15)))[0] == 504
    assert calls < 3
    await database.is_quiet()
    assert await database.names() == []


@pytest.mark.usefixtures("no_pauses")
async def test_an_attempt_after_a_commit_that_took_too_long_is_stopped(
    connect: DBConnect, database: Database
) -> None:
    calls = 0

    async def handler(_: Request) -> None:
        nonlocal calls
        calls += 1
        await add(connect, "a")
        if calls == 1:
            set_deadline(SHORT)
        else:
            await asyncio.sleep(30)

    async def fail_late(session: AsyncSession) -> None:
        await asyncio.sleep(2 * SHORT)
        await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    app = app_of(handler, attempts=2, before_commit=fail_late)
    assert (await answer_of(app))[0] == 504
    await database.is_quiet()
    assert await database.names() == []


async def test_whoever_leaves_after_the_start_is_not_stopped_by_it(connect: DBConnect) -> None:
    ended = asyncio.Event()

    async def handler(request: Request) -> Response:
        async def body() -> AsyncGenerator[bytes]:
            yield b"x"
            while not await request.is_disconnected():
                await asyncio.sleep(0.005)
            await asyncio.sleep(SHORT)
            ended.set()

        class Careful(StreamingResponse):
            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                await self.stream_response(send)  # whether the client is there or not

        return Careful(body(), 409)

    app = app_of(handler, cancel_on_disconnect={"GET"})
    async with serve(app, lifespan="off") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b"409" in await reader.readline()
        writer.close()
        async with asyncio.timeout(10):
            await ended.wait()


@pytest.mark.parametrize("between", [[], [Copying], [Spawning]])
@pytest.mark.parametrize(("streams", "attempts"), [(False, 1), (False, 2), (True, 1)])
async def test_no_commit_begins_between_the_stop_and_the_cancellation(
    connect: DBConnect, database: Database, between: list[Any], streams: bool, attempts: int
) -> None:
    async def write() -> None:
        await add(connect, "a")
        request = _here.get()
        assert request is not None
        request.stop(504)  # as a timer does, in a round of the loop in which this goes on

    async def body() -> AsyncGenerator[str]:
        await write()
        yield "done"

    async def handler(_: Request) -> Response | None:
        if streams:
            return StreamingResponse(body())
        await write()
        return None

    app = app_of(handler, attempts=attempts)
    late = [Buffering] if streams else []  # or else the response has started
    app.user_middleware[1:1] = map(Middleware, [*late, *between])
    assert await answer_of(app) == (504, "Gateway Timeout")
    await database.is_quiet()
    await assert_clean(connect, database)
    assert await database.names() == []


@pytest.mark.parametrize("middlewares", [[], [Holding, Spawning]])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("around", ["nothing", "a mount", "a copy"])
async def test_a_commit_that_has_begun_is_not_interrupted(
    database_url: URL, database: Database, middlewares: list[Any], streams: bool, around: str
) -> None:
    begun, called = asyncio.Event(), list[str]()

    async def hold(call: Call) -> None:
        if call.statement.startswith("COMMIT") and not begun.is_set():
            begun.set()
            await asyncio.sleep(3 * SHORT)

    async def handler(_: Request) -> Response | None:
        await add(connect, "a")

        async def call() -> None:
            await asyncio.sleep(SHORT)
            called.append("on commit")

        on_commit(connect, call)
        set_deadline(SHORT)
        return StreamingResponse(body()) if streams else None

    async def body() -> AsyncGenerator[str]:
        yield "done"

    async with proxy("127.0.0.1", database_url.port or 5432, hold) as port:
        target = database_url.set(host="127.0.0.1", port=port)
        async with DBConnect.from_url(target) as connect:
            app = app_of(handler, *middlewares)
            if around == "a copy":
                app.user_middleware.insert(1, Middleware(Copying))
            elif around == "a mount":  # with its own middleware, and only the limits around
                app.user_middleware.pop(0)
                app = Starlette(routes=[Mount("/", app)])
                app.add_middleware(RequestLimitsMiddleware)
            assert await answer_of(app) == (200, "done")
            assert begun.is_set()
            assert called == ["on commit"]
            assert connections_out(connect) == 0
    assert await database.names() == ["a"]


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("has_middleware", [False, True])
@pytest.mark.parametrize("when", ["at the end", "by hand", "in the background"])
async def test_what_was_committed_is_answered_by_a_middleware_that_takes_its_time(
    connect: DBConnect, database: Database, copies: bool, has_middleware: bool, when: str
) -> None:
    class Storing(Copying if copies else Passing):  # type: ignore[misc]
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            messages: list[Message] = []

            async def keep(message: Message) -> None:
                messages.append(message)

            await super().__call__(scope, receive, keep)
            await asyncio.sleep(2 * SHORT)
            for message in messages:
                await send(message)

    async def write(session: AsyncSession) -> None:
        await session.execute(insert(Item).values(name="a"))

    app = FastAPI()

    @app.get("/")
    async def endpoint(
        background: BackgroundTasks,
        session: AsyncSession = Depends(DBSessionDependency(connect)),  # noqa: B008
    ) -> str:
        if when == "in the background":
            background.add_task(write, session)
        else:
            await write(session)
        if when == "by hand":
            await session.commit()
        set_deadline(SHORT)
        return "done"

    if has_middleware:
        add_fastapi_http_db_session_middleware(app)
    app.add_middleware(Storing)
    app.add_middleware(RequestLimitsMiddleware)
    assert await answer_of(app) == (200, '"done"')
    assert await database.names() == ["a"]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_a_commit_calls_has_no_deadline_at_the_server_either(
    database_url: URL, database: Database, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with DBConnect.from_url(url, transaction_settings=deadline_settings) as connect:

        async def handler(_: Request) -> None:
            await add(connect, "a")

            async def call() -> None:
                await asyncio.sleep(SHORT)
                await (await add(connect, "b")).execute(text("SELECT pg_sleep(0.1)"))

            on_commit(connect, call)
            set_deadline(SHORT)

        assert await answer_of(app_of(handler)) == (200, "done")
    assert await database.names() == ["a", "b"]


async def test_who_leaves_during_a_commit_that_fails_leaves_no_timer_that_fails(
    database_url: URL, database: Database
) -> None:
    received: asyncio.Queue[Message] = asyncio.Queue()
    received.put_nowait({"type": "http.request", "body": b""})
    loop, problems = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, problem: problems.append(problem))

    async def leave_and_fail(call: Call) -> Fault | None:
        if not call.statement.startswith("COMMIT"):
            return None
        received.put_nowait({"type": "http.disconnect"})
        await until_empty(received)
        return Fault.ERROR

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await add(connect, "a")
        await respond(send)

    async def send(_: Message) -> None:
        pytest.fail("it is answered")

    async with (
        proxy("127.0.0.1", database_url.port or 5432, leave_and_fail) as port,
        DBConnect.from_url(database_url.set(host="127.0.0.1", port=port)) as connect,
    ):
        inner = ASGIHTTPDBSessionMiddleware(app)
        limited = RequestLimitsMiddleware(inner, 2 * SHORT, cancel_on_disconnect={"GET"})
        deadline = loop.time() + 2 * SHORT
        with pytest.raises(DBAPIError, match="injected"):
            await limited(http_scope(), received.get, send)
    await asyncio.sleep(deadline + SHORT - loop.time())  # when the timer is due
    assert problems == []
    assert await database.names() == []


async def test_what_follows_the_start_of_the_response_has_no_deadline(
    connect: DBConnect, database: Database
) -> None:
    async def later() -> None:
        set_deadline(0.01)  # too late to mean anything
        await asyncio.sleep(2 * SHORT)
        await add(connect, "c")

    async def body() -> AsyncGenerator[str]:
        for part in "ab":
            await asyncio.sleep(SHORT)
            await add(connect, part)
            yield part

    async def handler(_: Request) -> Response:
        set_deadline(SHORT)
        return StreamingResponse(body(), background=BackgroundTask(later))

    assert await answer_of(app_of(handler)) == (200, "ab")
    assert await database.names() == ["a", "b", "c"]


async def test_a_route_may_have_another_deadline(connect: DBConnect, database: Database) -> None:
    app = FastAPI()

    async def patient() -> None:
        set_deadline(30)

    async def hurried() -> None:
        set_deadline(0.05)

    async def endless() -> None:
        set_deadline(None)

    async def wait(name: str) -> None:
        await add(connect, name)
        await asyncio.sleep(1.2)

    for dependency in (patient, hurried, endless):
        depends = [Depends(dependency)]
        app.add_api_route(f"/{dependency.__name__}/{{name}}", wait, dependencies=depends)
    add_starlette_http_db_session_middleware(app)
    app.add_middleware(RequestLimitsMiddleware, timeout=1)
    async with http_client(app) as client:
        paths = ["patient/a", "hurried/b", "endless/c"]
        answers = await asyncio.gather(*(client.get(f"/{path}") for path in paths))
    assert [answer.status_code for answer in answers] == [200, 504, 200]
    await database.is_quiet()
    assert sorted(await database.names()) == ["a", "c"]


async def test_a_time_out_of_the_application_is_its_own(connect: DBConnect) -> None:
    async def handler(_: Request) -> None:
        await add(connect, "a")
        raise TimeoutError

    assert (await answer_of(app_of(handler, timeout=30)))[0] == 500


async def test_an_application_that_goes_on_is_believed(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Request) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await add(connect, "a")

    assert await answer_of(app_of(handler, timeout=SHORT)) == (200, "done")
    assert await database.names() == ["a"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": 0}, "a deadline must be more than 0 seconds, not 0"),
        ({"timeout": float("nan")}, "a deadline must be more than 0 seconds, not nan"),
        ({"timeout": "10"}, "a deadline must be a number of seconds, not str"),
        ({"cancel_on_disconnect": True}, "cancel_on_disconnect must be like"),
        ({"cancel_on_disconnect": "GET"}, "cancel_on_disconnect must be like"),
    ],
)
def test_limits_that_cannot_be_are_refused(options: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        RequestLimitsMiddleware(app_of(lambda _: asyncio.sleep(0)), **options)


def test_a_deadline_without_the_middleware_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs a RequestLimitsMiddleware around the request"):
        set_deadline(1)


# At the server


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_the_server_ends_a_statement_just_before_and_the_connection_stays(
    database_url: URL, database: Database, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with DBConnect.from_url(url, transaction_settings=deadline_settings) as connect:

        async def handler(_: Request) -> None:
            await (await db_session(connect)).execute(SLEEP)

        await connect.ping()
        backends = await database.backends()
        assert await answer_of(app_of(handler, timeout=0.5)) == (504, "Gateway Timeout")
        assert await database.backends() == backends
        assert connections_out(connect) == 0
        await connect.ping()


async def test_who_leaves_while_the_answer_is_made_is_not_stopped_again(
    database_url: URL,
) -> None:
    loop, problems = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, problem: problems.append(problem))
    answering, left = asyncio.Event(), asyncio.Event()

    async def handler(_: Request) -> None:
        await (await db_session(connect)).execute(SLEEP)

    async def answer(request: Request, _: Exception) -> Response:
        answering.set()
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        left.set()
        return PlainTextResponse("too slow", 504)

    async with DBConnect.from_url(database_url, transaction_settings=deadline_settings) as connect:
        app = app_of(handler, timeout=0.5, cancel_on_disconnect={"GET"})
        app.add_exception_handler(504, answer)
        async with serve(app, lifespan="off") as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            await answering.wait()
            writer.close()
            async with asyncio.timeout(10):
                await left.wait()
    gc.collect()  # asyncio tells of a task whose error nobody has asked for
    assert problems == []


async def test_the_settings_are_those_of_a_request_before_its_answer(database_url: URL) -> None:
    seen: list[tuple[str, str]] = []
    timeouts = text(
        "SELECT current_setting('statement_timeout'), current_setting('transaction_timeout')"
    )

    async def look() -> None:
        session = await db_session(connect)
        statement, transaction = (await session.execute(timeouts)).one()
        seen.append((statement, transaction))

    async def handler(_: Request) -> Response:
        await look()
        return PlainTextResponse("done", background=BackgroundTask(look))

    def settings() -> dict[str, str | int]:
        return deadline_settings(backstop=5)

    async with DBConnect.from_url(database_url, transaction_settings=settings) as connect:
        assert settings() == {}
        assert (await answer_of(app_of(handler)))[0] == 200  # it has no deadline
        assert (await answer_of(app_of(handler, timeout=10)))[0] == 200
    none = ("0", "0")
    limited = seen.pop(2)
    assert seen == [none, none, none]
    statement, transaction = (int(value.removesuffix("ms")) for value in limited)
    assert 5000 < statement < 10000
    assert statement + 4900 < transaction < 15000


@pytest.mark.skipif(
    Version(asyncpg.__version__) < Version("0.32"), reason="it waits for a silent server"
)
async def test_a_request_whose_server_is_silent_is_answered_when_the_driver_gives_up(
    database_url: URL,
) -> None:
    is_silent = False
    silence = asyncio.Event()

    async def hold(_: Call) -> None:
        if is_silent:
            await silence.wait()

    async def handler(_: Request) -> None:
        nonlocal is_silent
        session = await db_session(connect)
        await session.execute(text("SELECT 1"))
        is_silent = True
        set_deadline(SHORT)
        await session.execute(text("SELECT 2"))

    async with proxy("127.0.0.1", database_url.port or 5432, hold) as port:
        target = database_url.set(host="127.0.0.1", port=port)
        async with DBConnect.from_url(target) as connect:
            assert (await answer_of(app_of(handler)))[0] == 504
            assert connections_out(connect) == 0
            silence.set()


async def test_the_server_looks_whether_a_client_is_there_if_it_is_told_to(
    database_url: URL, database: Database
) -> None:
    settings = {"client_connection_check_interval": "50ms"}
    async with DBConnect.from_url(database_url, transaction_settings=lambda: settings) as connect:
        session = await connect.create_session()
        raw: Any = await (await session.connection()).get_raw_connection()
        sleeping = asyncio.create_task(session.execute(SLEEP))
        await until(database.is_asleep)
        raw.driver_connection.terminate()  # without a request to cancel
        await database.is_quiet()
        await asyncio.wait([sleeping])
        assert sleeping.exception() is not None
        await session.invalidate()


async def test_on_sqlite_a_statement_that_is_stopped_lets_go_of_its_locks(
    sqlite_connect: DBConnect, tmp_path: Path
) -> None:
    count = text(
        "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 5000000)"
        " SELECT count(*) FROM n"
    )

    async def handler(_: Request) -> None:
        await (await add(sqlite_connect, "a")).execute(count)

    assert (await answer_of(app_of(handler, timeout=SHORT)))[0] == 504
    with closing(sqlite3.connect(tmp_path / "test.db", timeout=0)) as other:
        other.execute("BEGIN EXCLUSIVE")  # at once
        assert other.execute("SELECT name FROM item").fetchall() == []


# Clients that leave


def leave(connection: socket.socket, how: str) -> None:
    if how == "RST":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.005)


async def until_empty(queue: asyncio.Queue[Any]) -> None:
    async with asyncio.timeout(10):
        while not queue.empty():
            await asyncio.sleep(0)


async def begins_to_sleep(database: Database) -> None:
    # A request to cancel that comes before the statement cancels nothing.
    await until(database.is_asleep)


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("middlewares", [[], [Spawning]])
@pytest.mark.parametrize("request_line", [b"GET /", b"POST /"])
async def test_the_query_that_nobody_waits_for_is_ended_at_the_server(
    connect: DBConnect,
    database: Database,
    how: str,
    middlewares: list[Any],
    request_line: bytes,
) -> None:
    async def handler(request: Request) -> None:
        session = await add(connect, str(len(await request.body())))
        await session.execute(SLEEP)

    app = app_of(handler, *middlewares, cancel_on_disconnect={"GET", "POST"})
    async with serve(app, lifespan="off") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = b"x" * 1_000_000 if request_line.startswith(b"POST") else b""
        writer.write(
            request_line + b" HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        await begins_to_sleep(database)
        raw = writer.get_extra_info("socket").dup()
        writer.transport.abort() if how == "RST" else writer.close()
        leave(raw, how)
        loop = asyncio.get_running_loop()
        since = loop.time()
        await database.is_quiet()
        assert loop.time() - since < 5  # it is 30 seconds otherwise; measured: a few milliseconds
        del reader
    assert await database.names() == []
    await assert_clean(connect, database)


async def test_a_request_of_another_method_goes_on(connect: DBConnect, database: Database) -> None:
    left = asyncio.Event()

    async def handler(_: Request) -> None:
        await add(connect, "a")
        left.set()
        await asyncio.sleep(SHORT)

    app = app_of(handler, cancel_on_disconnect={"GET", "HEAD"})
    async with serve(app, lifespan="off") as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        await left.wait()
        writer.close()

        async def is_stored() -> bool:
            return await database.names() == ["a"]

        await until(is_stored)


async def test_the_application_gets_every_message_of_its_request(connect: DBConnect) -> None:
    async def handler(request: Request) -> Response:
        parts = [part async for part in request.stream()]
        assert not await request.is_disconnected()
        return PlainTextResponse(str(sum(map(len, parts))))

    app = app_of(handler, cancel_on_disconnect={"POST"}, timeout=30)

    async def content() -> AsyncGenerator[bytes]:
        for _ in range(50):
            yield b"x" * 10_000
            await asyncio.sleep(0)

    assert await answer_of(app, "POST", content=content()) == (200, "500000")
    assert await answer_of(app, "POST", content=b"") == (200, "0")


async def test_an_error_of_the_server_reaches_the_application() -> None:
    async def receive() -> Message:
        raise ConnectionResetError

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        await receive()

    async def send(_: Message) -> None:
        pytest.fail("it is answered")

    limited = RequestLimitsMiddleware(app, cancel_on_disconnect={"GET"})
    with pytest.raises(ConnectionResetError):
        await limited(http_scope(), receive, send)


async def test_a_stream_hears_that_its_client_has_left(connect: DBConnect) -> None:
    ended = asyncio.Event()

    async def body() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"x" * 1000
                await asyncio.sleep(0.005)
        finally:
            ended.set()

    async def handler(_: Request) -> Response:
        return StreamingResponse(body())

    app = app_of(handler, cancel_on_disconnect={"GET"})
    async with http_client(app, lifespan="off") as client:
        async with client.stream("GET", "/") as response:
            async for _ in response.aiter_bytes():
                break
        async with asyncio.timeout(10):
            await ended.wait()


@pytest.mark.parametrize("name", SERVERS)
async def test_each_server_tells_of_a_client_that_leaves(
    name: str, database_url: URL, database: Database, tmp_path: Path
) -> None:
    with running_server(name, database_url, tmp_path / "log") as port:
        for how in ("FIN", "RST"):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(b"GET /asleep HTTP/1.1\r\nhost: a\r\n\r\n")
            await begins_to_sleep(database)
            leave(connection, how)
            await database.is_quiet()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.post("/a")).status_code == 201
    assert await database.names() == ["a"]


async def test_who_left_is_no_warning(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_: Request) -> None:
        await (await add(connect, "a")).execute(SLEEP)

    app: ASGIApp = app_of(handler, cancel_on_disconnect={"GET"})
    with caplog.at_level(logging.INFO, "context_async_sqlalchemy"):
        async with serve(app, lifespan="off") as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            await begins_to_sleep(database)
            writer.close()
            await database.is_quiet()
    (record,) = [r for r in caplog.records if "has left" in r.getMessage()]
    assert record.levelno == logging.INFO
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
