"""Programs written for 2.1.9, which did the same there, run unchanged.

Each was run on 2.1.9, on PostgreSQL, when it was written. What differs is in the changelog, under
"From 2.x", and is in none of them.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from sqlalchemy import URL, insert, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    ContextAlreadyInitiatedError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    db_session,
    get_db_session_from_context,
    init_db_session_ctx,
    is_context_initiated,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.starlette_utils import (
    StarletteHTTPDBSessionMiddleware,
    add_starlette_http_db_session_middleware,
    starlette_http_db_session_middleware,
)
from context_async_sqlalchemy.test_utils import (
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
)
from tests.conftest import Database
from tests.models import Item, Seat

MakeConnect = Callable[..., DBConnect]
REQUIRED = inspect.Parameter.empty

# The functions and classes of 2.1.9, by module, with their parameters and defaults.
SURFACE: dict[str, dict[str, dict[str, Any]]] = {
    "context_async_sqlalchemy": {
        "ASGIHTTPDBSessionMiddleware": {"app": REQUIRED, "before_commit": None},
        "DBConnect": {
            "engine_creator": REQUIRED,
            "session_maker_creator": REQUIRED,
            "host": None,
            "before_create_session_handler": None,
        },
        "DBConnect.change_host": {"self": REQUIRED, "host": REQUIRED},
        "DBConnect.close": {"self": REQUIRED},
        "DBConnect.connect": {"self": REQUIRED, "host": REQUIRED},
        "DBConnect.create_session": {"self": REQUIRED},
        "DBConnect.session_maker": {"self": REQUIRED},
        "atomic_db_session": {"connect": REQUIRED, "current_transaction": "commit"},
        "auto_commit_by_status_code": {"status_code": REQUIRED, "before_commit": None},
        "close_all_sessions": {},
        "close_db_session": {"connect": REQUIRED},
        "commit_all_sessions": {"before_commit": None},
        "commit_db_session": {"connect": REQUIRED},
        "db_session": {"connect": REQUIRED},
        "get_db_session_from_context": {"connect": REQUIRED},
        "init_db_session_ctx": {"force": False},
        "is_context_initiated": {},
        "new_non_ctx_atomic_session": {"connect": REQUIRED},
        "new_non_ctx_session": {"connect": REQUIRED},
        "pop_db_session_from_context": {"connect": REQUIRED},
        "reset_db_session_ctx": {"token": REQUIRED, "with_close": True},
        "rollback_all_sessions": {},
        "rollback_db_session": {"connect": REQUIRED},
        "run_in_new_ctx": {"callable_func": REQUIRED, "args": REQUIRED, "kwargs": REQUIRED},
    },
    "context_async_sqlalchemy.asgi_utils": {
        "ASGIHTTPDBSessionMiddleware": {"app": REQUIRED, "before_commit": None},
    },
    "context_async_sqlalchemy.auto_commit": {
        "auto_commit_by_status_code": {"status_code": REQUIRED, "before_commit": None},
        "close_all_sessions": {},
        "commit_all_sessions": {"before_commit": None},
        "rollback_all_sessions": {},
    },
    "context_async_sqlalchemy.connect": {
        "DBConnect": {
            "engine_creator": REQUIRED,
            "session_maker_creator": REQUIRED,
            "host": None,
            "before_create_session_handler": None,
        },
    },
    "context_async_sqlalchemy.context": {
        "get_db_session_from_context": {"connect": REQUIRED},
        "init_db_session_ctx": {"force": False},
        "is_context_initiated": {},
        "pop_db_session_from_context": {"connect": REQUIRED},
        "reset_db_session_ctx": {"token": REQUIRED, "with_close": True},
    },
    "context_async_sqlalchemy.run_in_new_context": {
        "run_in_new_ctx": {"callable_func": REQUIRED, "args": REQUIRED, "kwargs": REQUIRED},
    },
    "context_async_sqlalchemy.session": {
        "atomic_db_session": {"connect": REQUIRED, "current_transaction": "commit"},
        "close_db_session": {"connect": REQUIRED},
        "commit_db_session": {"connect": REQUIRED},
        "db_session": {"connect": REQUIRED},
        "new_non_ctx_atomic_session": {"connect": REQUIRED},
        "new_non_ctx_session": {"connect": REQUIRED},
        "rollback_db_session": {"connect": REQUIRED},
    },
    "context_async_sqlalchemy.fastapi_utils": {
        "add_fastapi_http_db_session_middleware": {"app": REQUIRED, "before_commit": None},
        "fastapi_http_db_session_middleware": {
            "request": REQUIRED,
            "call_next": REQUIRED,
            "before_commit": None,
        },
    },
    "context_async_sqlalchemy.starlette_utils": {
        "add_starlette_http_db_session_middleware": {"app": REQUIRED, "before_commit": None},
        "starlette_http_db_session_middleware": {
            "request": REQUIRED,
            "call_next": REQUIRED,
            "before_commit": None,
        },
    },
    "context_async_sqlalchemy.test_utils": {
        "put_savepoint_session_in_ctx": {"connection": REQUIRED, "session": REQUIRED},
        "rollback_session": {"connection": REQUIRED},
        "set_test_context": {"auto_close": False},
    },
}
FUNCTIONS = [(module, name) for module, names in SURFACE.items() for name in names]


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_function_of_2x_takes_the_same_parameters(module: str, name: str) -> None:
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    parameters = list(inspect.signature(function).parameters.values())
    expected = SURFACE[module][name]
    assert {p.name: p.default for p in parameters[: len(expected)]} == expected
    added = parameters[len(expected) :]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(p.default is not REQUIRED or p.kind in variable for p in added)


@pytest.mark.parametrize("module", ["context_async_sqlalchemy", "context_async_sqlalchemy.context"])
def test_the_errors_of_2x_are_where_they_were(module: str) -> None:
    for error in (ContextAlreadyInitiatedError, ContextNotInitiatedError):
        assert getattr(importlib.import_module(module), error.__name__) is error


@pytest_asyncio.fixture
async def make(database_url: URL, database: Database) -> AsyncGenerator[MakeConnect]:
    """Return what a user's database.py does; each connect is closed at the end."""
    made: list[DBConnect] = []

    def create_engine(host: str) -> AsyncEngine:
        return create_async_engine(database_url.set(host=host), future=True, pool_pre_ping=True)

    def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)

    def make(**options: Any) -> DBConnect:
        made.append(
            DBConnect(
                engine_creator=create_engine,
                session_maker_creator=create_session_maker,
                **{"host": database_url.host} | options,
            )
        )
        return made[-1]

    yield make
    for connection in made:
        await connection.close()


@pytest.fixture
def connection(make: MakeConnect) -> DBConnect:
    return make()


async def add(connection: DBConnect, name: str) -> AsyncSession:
    session = await db_session(connection)
    await session.execute(insert(Item).values(name=name))
    return session


# The connect


async def test_a_connect_opens_nothing_until_it_is_used(connection: DBConnect) -> None:
    assert isinstance(connection.context_key, str)
    assert not connection._engine
    assert not connection._session_maker
    session = await connection.create_session()
    assert isinstance(connection._engine, AsyncEngine)
    assert await connection.session_maker() is connection._session_maker
    assert await session.scalar(select(1)) == 1
    await session.close()
    await connection.close()
    assert not connection._engine
    assert not connection._session_maker
    await connection.close()
    async with new_non_ctx_session(connection) as again:
        assert await again.scalar(select(1)) == 1


async def test_a_connect_changes_its_host(connection: DBConnect) -> None:
    await connection.session_maker()
    first, host = connection._engine, connection.host
    assert host is not None
    await connection.change_host(host)
    assert connection._engine is first
    await connection.connect(host)
    assert connection._engine is not first
    await connection.change_host("127.0.0.1" if host != "127.0.0.1" else "localhost")
    assert connection.host != host
    with pytest.raises(ValueError, match="host must not be empty"):
        await connection.change_host("")


async def test_the_handler_may_set_the_host(database_url: URL, make: MakeConnect) -> None:
    async def handler(connection: DBConnect) -> None:
        assert database_url.host is not None
        await connection.change_host(database_url.host)

    connection = make(host=None, before_create_session_handler=handler)
    async with new_non_ctx_session(connection) as session:
        assert await session.scalar(select(1)) == 1
    with pytest.raises(ValueError, match="host is not set"):
        await make(host=None).create_session()


async def test_a_session_in_flight_outlives_the_engine(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "a")
    await connection.close()
    await session.commit()
    await reset_db_session_ctx(token)
    assert await database.names() == ["a"]


# A context by hand


async def test_a_context_is_opened_and_ended_by_hand(connection: DBConnect) -> None:
    assert not is_context_initiated()
    with pytest.raises(ContextNotInitiatedError):
        await db_session(connection)
    token = init_db_session_ctx()
    assert is_context_initiated()
    assert get_db_session_from_context(connection) is None
    session = await asyncio.create_task(db_session(connection))
    assert await db_session(connection) is session
    with pytest.raises(ContextAlreadyInitiatedError):
        init_db_session_ctx()
    inner = init_db_session_ctx(force=True)
    assert await db_session(connection) is not session
    await reset_db_session_ctx(inner)
    assert pop_db_session_from_context(connection) is session
    assert pop_db_session_from_context(connection) is None
    put_db_session_to_context(connection, session)
    assert await db_session(connection) is session
    await reset_db_session_ctx(token, with_close=True)
    assert not is_context_initiated()


async def test_a_context_that_is_ended_without_closing_leaves_its_session(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "a")
    await reset_db_session_ctx(token, with_close=False)
    await session.commit()
    await session.close()
    assert await database.names() == ["a"]


@pytest.mark.parametrize(
    ("status", "names"), [(200, ["a"]), (302, ["a"]), (399, ["a"]), (400, []), (500, [])]
)
async def test_the_status_decides(
    status: int, names: list[str], connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    await add(connection, "a")
    await auto_commit_by_status_code(status)
    await reset_db_session_ctx(token)
    assert await database.names() == names


async def test_all_sessions_are_committed_rolled_back_and_closed(
    make: MakeConnect, database: Database
) -> None:
    one, two = make(), make()
    token = init_db_session_ctx()
    await add(one, "a")
    await add(two, "b")
    await commit_all_sessions()
    assert sorted(await database.names()) == ["a", "b"]
    await add(one, "c")
    await add(two, "d")
    await rollback_all_sessions()
    session = await add(one, "e")
    await close_all_sessions()
    assert not session.in_transaction()
    await reset_db_session_ctx(token)
    assert sorted(await database.names()) == ["a", "b"]


async def test_before_commit_is_awaited_for_a_transaction(connection: DBConnect) -> None:
    called: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        called.append(session)

    token = init_db_session_ctx()
    session = await db_session(connection)
    await commit_all_sessions(before_commit)
    await add(connection, "a")
    await rollback_all_sessions()
    assert called == []
    await add(connection, "b")
    await auto_commit_by_status_code(status_code=200, before_commit=before_commit)
    assert called == [session]
    await reset_db_session_ctx(token)


async def test_a_session_in_a_context_may_be_a_mock(connection: DBConnect) -> None:
    mock = AsyncMock(spec=AsyncSession)
    mock.in_transaction.return_value = True
    token = init_db_session_ctx()
    put_db_session_to_context(connection, mock)
    await commit_all_sessions()
    await rollback_all_sessions()
    await reset_db_session_ctx(token)
    counts = (mock.commit.await_count, mock.rollback.await_count, mock.close.await_count)
    assert counts == (1, 1, 1)


# The session


async def test_a_session_is_committed_rolled_back_and_closed_by_hand(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "a")
    await commit_db_session(connection)
    await add(connection, "b")
    await rollback_db_session(connection)
    assert await db_session(connection) is session
    await close_db_session(connection)
    assert get_db_session_from_context(connection) is None
    assert await add(connection, "c") is not session
    await commit_db_session(connection)
    await reset_db_session_ctx(token)
    assert await database.names() == ["a", "c"]


async def test_a_commit_that_fails_is_raised(connection: DBConnect, database: Database) -> None:
    token = init_db_session_ctx()
    session = await db_session(connection)
    session.add_all([Seat(number=1), Seat(number=1)])
    with pytest.raises(IntegrityError):
        await commit_db_session(connection)
    await reset_db_session_ctx(token)
    assert await database.seats() == []


@pytest.mark.parametrize(
    ("mode", "stored", "stored_if_it_fails"),
    [
        ("commit", ["before", "in"], ["before"]),
        ("rollback", ["in"], []),
        ("append", ["before", "in"], []),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
async def test_an_atomic_block_ends_an_open_transaction_or_goes_on_with_it(
    mode: Any,
    stored: list[str],
    stored_if_it_fails: list[str],
    fails: bool,
    connection: DBConnect,
    database: Database,
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "before")
    try:
        async with atomic_db_session(connection, mode) as same:
            assert same is session
            await add(connection, "in")
            if fails:
                raise LookupError
    except LookupError:
        assert fails
    assert not session.in_transaction()
    await reset_db_session_ctx(token)
    assert await database.names() == (stored_if_it_fails if fails else stored)


async def test_an_atomic_block_may_refuse_an_open_transaction(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    async with atomic_db_session(connect=connection, current_transaction="raise"):
        await add(connection, "a")
    await add(connection, "b")
    with pytest.raises(InvalidRequestError):
        async with atomic_db_session(connection, "raise"):
            pytest.fail("the block must not run")
    await reset_db_session_ctx(token)
    assert await database.names() == ["a"]


async def test_sessions_without_a_context(connection: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(connection) as session:
        await session.execute(insert(Item).values(name="not committed"))
    async with new_non_ctx_session(connection) as session:
        await session.execute(insert(Item).values(name="a"))
        await session.commit()
    async with new_non_ctx_atomic_session(connection) as session:
        assert session.in_transaction()
        await session.execute(insert(Item).values(name="b"))
    with pytest.raises(LookupError):
        async with new_non_ctx_atomic_session(connection) as session:
            await session.execute(insert(Item).values(name="fails"))
            raise LookupError
    assert await database.names() == ["a", "b"]


async def test_calls_in_new_contexts_are_apart(connection: DBConnect, database: Database) -> None:
    async def work(name: str, *, fails: bool = False) -> AsyncSession:
        session = await add(connection, name)
        if fails:
            raise LookupError(name)
        return session

    token = init_db_session_ctx()
    outer = await add(connection, "outer, rolled back")
    sessions = await asyncio.gather(
        run_in_new_ctx(work, "a"), run_in_new_ctx(work, name="b", fails=False)
    )
    with pytest.raises(LookupError):
        await run_in_new_ctx(work, "c", fails=True)
    assert len({outer, *sessions}) == 3
    assert await db_session(connection) is outer
    await reset_db_session_ctx(token)
    assert sorted(await database.names()) == ["a", "b"]


# The middleware


def by_asgi(app: FastAPI) -> None:
    app.add_middleware(ASGIHTTPDBSessionMiddleware)


def by_class(app: FastAPI) -> None:
    app.add_middleware(StarletteHTTPDBSessionMiddleware)


def by_decorator(app: FastAPI) -> None:
    app.middleware("http")(starlette_http_db_session_middleware)


def by_dispatch(app: FastAPI) -> None:
    app.add_middleware(BaseHTTPMiddleware, dispatch=fastapi_http_db_session_middleware)


WAYS = [
    add_fastapi_http_db_session_middleware,
    add_starlette_http_db_session_middleware,
    by_asgi,
    by_class,
    by_decorator,
    by_dispatch,
]


async def post(app: ASGIApp, *paths: str) -> list[int]:
    """Send requests; return their statuses."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return [(await client.post(path)).status_code for path in paths]


@pytest.mark.parametrize("add_middleware", WAYS)
async def test_a_request_is_committed_by_its_status(
    add_middleware: Callable[[FastAPI], None], connection: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_middleware(app)

    @app.post("/status/{status}")
    async def answer(status: int) -> Response:
        await add(connection, str(status))
        return JSONResponse({}, status)

    @app.post("/refused")
    async def refuse() -> None:
        await add(connection, "refused")
        raise HTTPException(409)

    @app.post("/fails")
    async def fail() -> None:
        await add(connection, "fails")
        raise LookupError

    @app.post("/early")
    async def commit_early() -> None:
        await add(connection, "early")
        await commit_db_session(connection)
        await close_db_session(connection)
        await add(connection, "late")
        raise HTTPException(404)

    statuses = await post(app, "/status/200", "/status/302", "/status/404")
    assert statuses == [200, 302, 404]
    assert await post(app, "/refused", "/fails", "/early") == [409, 500, 404]
    assert await database.names() == ["200", "302", "early"]


@pytest.mark.parametrize("takes_keyword", [False, True])
async def test_before_commit_of_the_middleware_is_called_before_a_commit_only(
    takes_keyword: bool, connection: DBConnect
) -> None:
    called: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        called.append(session)

    async def answer(request: Request) -> Response:
        await add(connection, request.path_params["status"])
        return Response(status_code=int(request.path_params["status"]))

    app = Starlette(routes=[Route("/{status}", answer, methods=["POST"])])
    if takes_keyword:
        add_starlette_http_db_session_middleware(app, before_commit=before_commit)
    else:
        add_starlette_http_db_session_middleware(app, before_commit)
    assert await post(app, "/200", "/404") == [200, 404]
    assert len(called) == 1


async def test_a_middleware_of_ones_own_settles_by_the_status(
    connection: DBConnect, database: Database
) -> None:
    async def middleware(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        token = init_db_session_ctx()
        try:
            response = await call_next(request)
            await auto_commit_by_status_code(response.status_code)
        except Exception:
            await rollback_all_sessions()
            raise
        finally:
            await reset_db_session_ctx(token)
        return response

    app = FastAPI()
    app.middleware("http")(middleware)

    @app.post("/{status}")
    async def answer(status: int) -> Response:
        await add(connection, str(status))
        return JSONResponse({}, status)

    assert await post(app, "/201", "/404") == [201, 404]
    assert await database.names() == ["201"]


# Tests


@pytest_asyncio.fixture
async def session(connection: DBConnect) -> AsyncGenerator[AsyncSession]:
    """Return the session of a test, on one connection with the application."""
    async with (
        rollback_session(connection) as session,
        set_test_context(),
        put_savepoint_session_in_ctx(connection, session),
    ):
        yield session


async def test_a_test_and_the_application_share_a_transaction(
    session: AsyncSession, connection: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.post("/{name}")
    async def create(name: str) -> None:
        await add(connection, name)
        await commit_db_session(connection)
        await add(connection, "rolled back")
        await rollback_db_session(connection)

    assert await post(app, "/a") == [200]
    assert (await session.scalars(select(Item.name))).all() == ["a"]
    assert await database.names() == []


async def test_a_test_context_commits_or_rolls_back_and_closes_if_asked_to(
    connection: DBConnect, database: Database
) -> None:
    async with set_test_context(auto_close=True):
        session = await add(connection, "a")
    assert not session.in_transaction()
    with pytest.raises(LookupError):
        async with set_test_context(auto_close=True):
            session = await add(connection, "b")
            raise LookupError
    assert not session.in_transaction()
    assert await database.names() == ["a"]
