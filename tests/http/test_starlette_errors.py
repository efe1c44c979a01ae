"""What a client is told of a database that is away, or of a race that is lost, over HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
import stamina
from fastapi import FastAPI
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    fastapi_utils,
    new_non_ctx_session,
    starlette_utils,
)
from context_async_sqlalchemy.starlette_utils import add_database_exception_handlers
from tests.helpers.asgi import add, call
from tests.helpers.database import Database, checked_connect, make_connect
from tests.helpers.failures import (
    Failing,
    be_one_too_many,
    be_refused,
    be_terminated_between_statements,
    be_terminated_inside_a_statement,
    connect_with,
    deadlock,
    divide_by_zero,
    fail_to_lock,
    fail_to_serialize,
    violate_a_constraint,
)
from tests.helpers.programs import until
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.serving import http_client


@pytest_asyncio.fixture(params=["asyncpg", "psycopg"])
async def serializable(
    request: pytest.FixtureRequest, database_url: URL, database: Database
) -> AsyncGenerator[DBConnect]:
    """Return a connect whose transactions are SERIALIZABLE, with each driver for PostgreSQL."""
    url = database_url.set(drivername=f"postgresql+{request.param}")
    options = {"isolation_level": "SERIALIZABLE", "pool_timeout": 0.05, "max_overflow": 0}
    async with checked_connect(url, database, **options) as connect:
        yield connect


def app_of(work: Any, *args: Any, fastapi: bool = False, **options: Any) -> Starlette:
    """Make an application whose only endpoint does `work`."""

    async def endpoint(request: Request) -> Response:
        await work(*args)
        return JSONResponse({})

    app = FastAPI() if fastapi else Starlette()
    app.router.routes.append(Route("/", endpoint))
    starlette_utils.add_starlette_http_db_session_middleware(app, **options)
    add_database_exception_handlers(app)
    return app


async def answer_of(app: Starlette) -> tuple[int, Any, str | None]:
    """Return the status, the body and `Retry-After`."""
    async with http_client(app) as client:
        response = await client.get("/")
    is_json = response.headers["content-type"] == "application/json"
    body = response.json() if is_json else response.text
    return response.status_code, body, response.headers.get("retry-after")


UNAVAILABLE = (503, {"detail": "The database is not available. Try again later."}, "5")
CONFLICT = (409, {"detail": "Another request was first. Send this one again."}, None)
ERROR = (500, "Internal Server Error", None)


async def wait_for_the_pool(connect: DBConnect, _: Database) -> None:
    sessions = [await connect.create_session() for _ in range(6)]
    try:
        for session in sessions:
            await session.execute(text("SELECT 1"))
    finally:
        for session in sessions:
            await session.close()


async def wait_where_nobody_may(connect: DBConnect, database: Database) -> None:
    await connect.session_maker()
    assert connect.engine is not None
    url = connect.engine.url
    async with DBConnect.from_url(url, pool_size=1, max_overflow=0, max_waiting=0) as impatient:
        await wait_for_the_pool(impatient, database)


async def ignore_a_lost_race(connect: DBConnect, _: Database) -> None:
    session = await db_session(connect)
    with pytest.raises(DBAPIError):
        await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))


async def lose_the_race_at_commit(connect: DBConnect, _: Database) -> None:
    one = await db_session(connect)
    async with new_non_ctx_session(connect) as two:
        for session in (one, two):
            await session.execute(text("SELECT count(*) FROM item"))
            await session.execute(text("INSERT INTO item (name) SELECT pg_backend_pid()::text"))
        await two.commit()


@pytest.mark.parametrize("fastapi", [False, True])
@pytest.mark.parametrize(
    ("work", "answer"),
    [
        (be_refused, UNAVAILABLE),
        (be_one_too_many, UNAVAILABLE),
        (be_terminated_between_statements, UNAVAILABLE),
        (be_terminated_inside_a_statement, UNAVAILABLE),
        (wait_for_the_pool, UNAVAILABLE),
        (wait_where_nobody_may, UNAVAILABLE),
        (fail_to_serialize, CONFLICT),
        (lose_the_race_at_commit, CONFLICT),
        (ignore_a_lost_race, CONFLICT),
        (deadlock, CONFLICT),
        (fail_to_lock, CONFLICT),
        (violate_a_constraint, ERROR),
        (divide_by_zero, ERROR),
    ],
)
async def test_an_error_of_the_database_is_answered_by_its_kind(
    serializable: DBConnect, database: Database, work: Any, answer: Any, fastapi: bool
) -> None:
    app = app_of(work, serializable, database, fastapi=fastapi)
    assert await answer_of(app) == answer


async def test_a_server_that_does_not_answer_is_not_available(
    database_url: URL, database: Database
) -> None:
    async def be_silent(_: Call) -> Fault | None:
        await asyncio.Event().wait()
        return None

    async def work(connect: DBConnect) -> None:
        await (await db_session(connect)).execute(text("SELECT 1"))

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, be_silent) as port:
        url = database_url.set(host="127.0.0.1", port=port)
        async with make_connect(url, connect_args={"timeout": 0.2}) as connect:
            assert await answer_of(app_of(work, connect)) == UNAVAILABLE


async def test_a_statement_that_takes_too_long_is_an_error(
    database_url: URL, database: Database
) -> None:
    async def work(connect: DBConnect) -> None:
        await (await db_session(connect)).execute(text("SELECT pg_sleep(20)"))

    async with make_connect(database_url, connect_args={"command_timeout": 0.2}) as connect:
        assert await answer_of(app_of(work, connect)) == ERROR


async def test_a_commit_whose_outcome_is_unknown_is_an_error(
    database_url: URL, database: Database
) -> None:
    async def lose_commit(call: Call) -> Fault | None:
        return Fault.LOST_AFTER if call.statement.startswith("COMMIT") else None

    assert database_url.host is not None
    assert database_url.port is not None
    async with (
        proxy(database_url.host, database_url.port, lose_commit) as port,
        make_connect(database_url.set(host="127.0.0.1", port=port)) as connect,
    ):
        assert await answer_of(app_of(add, connect, "a")) == ERROR
    assert await database.names() == ["a"]


async def test_the_error_of_the_last_attempt_is_answered(
    connect: DBConnect, database: Database
) -> None:
    calls: list[int] = []

    async def lose(times: int) -> None:
        calls.append(times)
        session = await add(connect, f"{times} {len(calls)}")
        if len(calls) <= times:
            await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    with stamina.set_testing(True, attempts=3, cap=True):
        assert (await answer_of(app_of(lose, 2, attempts=3)))[0] == 200
        assert len(calls) == 3
        assert await answer_of(app_of(lose, 9, attempts=3)) == CONFLICT
        assert len(calls) == 6
    assert await database.names() == ["2 3"]


async def test_no_answer_and_no_log_shows_a_statement_or_a_password(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        await connect_with(connect, password="hunter2", port=1)

    async def lose() -> None:
        session = await db_session(connect)
        await session.execute(
            text("SELECT :secret, 'hunter2', pg_terminate_backend(pg_backend_pid())"),
            {"secret": "hunter2"},
        )

    async def fail_with_the_url() -> None:
        reason = OSError("cannot reach postgresql://app:hunter2@db.example.com/shop")
        raise OperationalError("SELECT 'hunter2'", {}, reason, connection_invalidated=True)

    with caplog.at_level(logging.WARNING, "context_async_sqlalchemy"):
        for app in app_of(work), app_of(lose), app_of(fail_with_the_url):
            assert await answer_of(app) == UNAVAILABLE
    records = [r for r in caplog.records if r.name == "context_async_sqlalchemy"]
    assert len(records) == 3
    assert all("answered with 503" in r.getMessage() for r in records)
    assert not any("hunter2" in r.getMessage() or r.exc_info for r in records)


@pytest.mark.parametrize(
    ("failures", "tries", "answer", "told"),
    [
        (2, 3, (200, {}, None), 0),  # two answers are not sent
        (3, 3, CONFLICT, 1),
        (3, 1, CONFLICT, 1),  # it is held back, and sent as nothing is tried again
    ],
)
async def test_an_answer_is_logged_if_it_is_sent(
    caplog: pytest.LogCaptureFixture, failures: int, tries: int, answer: Any, told: int
) -> None:
    fail = Failing(failures)

    async def work() -> None:
        fail()

    with stamina.set_testing(True, attempts=tries):
        assert await answer_of(app_of(work, attempts=3)) == answer
    assert caplog.text.count("A request was answered with 409") == told


async def test_an_answer_is_not_logged_if_its_request_is_cancelled_before_it_is_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail = Failing(100)

    async def work() -> None:
        fail()

    request = asyncio.create_task(call(app_of(work, attempts=100)))
    await until(lambda: "retry_scheduled" in caplog.text)
    request.cancel()
    await asyncio.wait([request])
    assert request.cancelled()
    assert "A request was answered" not in caplog.text


@pytest.mark.parametrize("cls", [OperationalError, DBAPIError, SQLAlchemyError, IntegrityError])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_the_handlers_of_the_application_are_called_as_before(
    connect: DBConnect, database: Database, cls: type[Exception], kind: str
) -> None:
    async def handle(_: Request, error: Exception) -> Response:
        return JSONResponse(type(error).__name__, 418)

    def handle_sync(_: Request, error: Exception) -> Response:
        return JSONResponse(type(error).__name__, 418)

    app = Starlette()
    app.add_exception_handler(cls, handle if kind == "async" else handle_sync)

    async def violate(request: Request) -> Response:
        await violate_a_constraint(connect, database)
        return JSONResponse({})

    app.router.routes.append(Route("/", violate))
    add_database_exception_handlers(app)
    answer = ERROR if cls is OperationalError else (418, "IntegrityError", None)
    assert await answer_of(app) == answer


async def test_a_websocket_is_left_alone(connect: DBConnect) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        raise OperationalError("", {}, OSError(), connection_invalidated=True)

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    add_database_exception_handlers(app)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b""}
    with pytest.raises(OperationalError):
        await app(scope, receive, send)
    assert sent == ["websocket.accept"]


async def test_an_error_of_another_service_is_left_alone() -> None:
    async def fail() -> None:
        raise ConnectionResetError

    assert await answer_of(app_of(fail)) == ERROR


async def test_an_application_that_has_started_is_refused() -> None:
    app = Starlette()
    with pytest.raises(ValueError, match="retry_after"):
        add_database_exception_handlers(app, retry_after=-1)
    async with http_client(app) as client:
        await client.get("/")
        with pytest.raises(RuntimeError, match="before the application has started"):
            add_database_exception_handlers(app)


def test_the_fastapi_module_has_the_same_names() -> None:
    for name in ("add_database_exception_handlers", "database_health", "database_lifespan"):
        assert getattr(fastapi_utils, name) is getattr(starlette_utils, name)
