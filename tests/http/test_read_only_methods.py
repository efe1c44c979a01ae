"""The option read_only_methods: whose sessions only read, however the middleware is added."""

# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import logging
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    get_db_session_from_context,
    pop_db_session_from_context,
    put_db_session_to_context,
    rollback_db_session,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Scope
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.starlette_utils import (
    StarletteHTTPDBSessionMiddleware,
    add_starlette_http_db_session_middleware,
    starlette_http_db_session_middleware,
)
from tests.helpers.asgi import add, app_of, call, http_scope
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.programs import until
from tests.helpers.serving import http_client

READS = {"read_only_methods": {"GET", "HEAD"}}
NAMES = select(Item.name).order_by(Item.id)


def around(app: FastAPI, **options: Any) -> ASGIApp:
    return ASGIHTTPDBSessionMiddleware(app, **options)


def added(app: FastAPI, **options: Any) -> ASGIApp:
    add_fastapi_http_db_session_middleware(app, **options)
    return app


def added_as_of_starlette(app: FastAPI, **options: Any) -> ASGIApp:
    add_starlette_http_db_session_middleware(app, **options)
    return app


def added_as_a_class(app: FastAPI, **options: Any) -> ASGIApp:
    app.add_middleware(StarletteHTTPDBSessionMiddleware, **options)
    return app


def added_as_a_function(app: FastAPI, **options: Any) -> ASGIApp:
    app.middleware("http")(partial(fastapi_http_db_session_middleware, **options))
    return app


def added_as_dispatch(app: FastAPI, **options: Any) -> ASGIApp:
    dispatch = partial(starlette_http_db_session_middleware, **options)
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    return app


WAYS = [
    around,
    added,
    added_as_of_starlette,
    added_as_a_class,
    added_as_a_function,
    added_as_dispatch,
]
Way = Callable[..., ASGIApp]


@pytest.mark.parametrize("way", WAYS)
async def test_such_a_request_reads_only_unless_it_says_otherwise(
    way: Way, connect: DBConnect, database: Database
) -> None:
    app = FastAPI()

    @app.get("/")
    async def get() -> None:
        reading = await db_session(connect)
        with pytest.raises(InvalidRequestError, match="read_only_methods"):
            await reading.execute(insert(Item).values(name="a"))
        await reading.rollback()
        writing = await db_session(connect, read_only=False)
        await writing.execute(insert(Item).values(name="b"))
        assert await db_session(connect) is writing  # from now on
        assert await db_session(connect, read_only=True) is reading

    @app.post("/")
    async def post() -> None:
        await add(connect, "c")

    async with http_client(way(app, **READS)) as client:
        for method in ("GET", "POST"):
            assert (await client.request(method, "/")).status_code == 200
    assert connections_out(connect) == 0
    assert await database.names() == ["b", "c"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("methods", ["GET", {"get"}, {b"GET"}, {None}, 1, None])
async def test_what_is_no_set_of_methods_is_refused(way: Way, methods: Any) -> None:
    app = FastAPI()
    with pytest.raises(TypeError, match=r"read_only_methods must be like \{'GET', 'HEAD'\}"):
        await call(way(app, read_only_methods=methods))  # some are made at the first request


def test_a_dependency_without_the_middleware_has_no_such_option() -> None:
    options: Any = READS
    with pytest.raises(TypeError, match="read_only_methods"):
        DBSessionDependency(**options)
    with pytest.raises(TypeError, match="read_only_methods"):
        DBConnect.from_url("sqlite://", **options)


async def test_a_nested_middleware_says_that_its_own_has_no_effect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handle(_: Scope) -> int:
        return 200

    nested = ASGIHTTPDBSessionMiddleware(app_of(handle, **READS))
    with caplog.at_level(logging.WARNING):
        await call(nested)
    assert "its own read_only_methods has no effect" in caplog.text


@pytest.mark.parametrize("manages", [True, False])
async def test_the_session_of_a_dependency_reads_only(
    connect: DBConnect, database: Database, manages: bool
) -> None:
    dependency = DBSessionDependency(connect, manage_transactions=manages)
    app = FastAPI()
    added(app, **READS)

    @app.api_route("/", methods=["GET", "POST"])
    async def both(
        request: Request, session: Annotated[AsyncSession, Depends(dependency)]
    ) -> list[str]:
        assert await db_session(connect) is session
        names = list(await session.scalars(NAMES))
        if request.query_params:
            await session.execute(insert(Item).values(name=request.method))
            await session.commit()
        return names

    async with http_client(app) as client:
        assert (await client.post("/?write=1")).json() == []
        assert (await client.get("/")).json() == ["POST"]
        assert (await client.get("/?write=1")).status_code == 500
    assert connections_out(connect) == 0
    assert await database.names() == ["POST"]


async def test_the_functions_that_take_a_connect_mean_the_session_that_it_gives(
    connect: DBConnect,
) -> None:
    async def handle(_: Scope) -> int:
        assert get_db_session_from_context(connect) is None
        reading = await db_session(connect)
        assert get_db_session_from_context(connect) is reading
        for end in (commit_db_session, rollback_db_session):
            await reading.execute(NAMES)
            await end(connect)
            assert connections_out(connect) == 0
        await reading.execute(NAMES)
        await close_db_session(connect)
        assert connections_out(connect) == 0
        again = await db_session(connect)
        assert again is not reading
        assert pop_db_session_from_context(connect) is again
        await again.execute(NAMES)
        writing = await db_session(connect, read_only=False)
        assert get_db_session_from_context(connect) is writing
        put_db_session_to_context(connect, again)
        assert await db_session(connect) is again
        return 200

    await call(app_of(handle, **READS))
    assert connections_out(connect) == 0


async def test_an_atomic_block_of_such_a_request_writes(
    connect: DBConnect, database: Database
) -> None:
    async def handle(_: Scope) -> int:
        await (await db_session(connect)).execute(NAMES)
        async with atomic_db_session(connect) as session:
            assert await db_session(connect) is session
            session.add(Item(name="a"))
        return 200

    await call(app_of(handle, **READS))
    assert await database.names() == ["a"]


async def test_the_connection_is_back_before_the_body_is_read(
    connect: DBConnect, database: Database
) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a')")
    app = FastAPI()
    out: list[int] = []

    async def body(session: AsyncSession) -> AsyncGenerator[str]:
        out.append(connections_out(connect))
        yield str(await session.scalar(NAMES))  # in a second use of the connection

    @app.get("/")
    async def get(tasks: BackgroundTasks) -> StreamingResponse:
        session = await db_session(connect)
        await session.execute(NAMES)
        tasks.add_task(session.execute, NAMES)
        return StreamingResponse(body(session), background=tasks)

    async with http_client(added(app, **READS)) as client:
        assert (await client.get("/")).text == "a"
    assert out == [0]
    await until(lambda: connections_out(connect) == 0)


async def test_before_commit_is_not_called_for_what_only_reads(
    connect: DBConnect, database: Database
) -> None:
    called: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        called.append(session)
        await (await db_session(connect, read_only=True)).execute(NAMES)
        await session.execute(insert(Item).values(name="audit"))

    async def handle(_: Scope) -> int:
        await (await db_session(connect)).execute(NAMES)
        return 200

    app = app_of(handle, before_commit=before_commit, **READS)
    await call(app)
    assert called == []
    assert await database.names() == []

    async def write(_: Scope) -> int:
        called.append(await add(connect, "a"))
        await (await db_session(connect, read_only="snapshot")).execute(NAMES)
        return 200

    app = app_of(write, before_commit=before_commit)
    await call(app)
    assert len(called) == 2
    assert called[0] is called[1]
    assert await database.names() == ["a", "audit"]


@pytest.mark.parametrize("mode", [None, "snapshot"])
async def test_a_request_that_has_only_read_is_repeated_even_after_a_commit(
    connect: DBConnect, no_pauses: None, mode: Any
) -> None:
    attempts = 0

    async def handle(_: Scope) -> int:
        nonlocal attempts
        attempts += 1
        session = await db_session(connect, read_only=mode)
        await session.execute(NAMES)
        await session.commit()
        if attempts == 1:
            orig = Exception()
            orig.sqlstate = "40001"  # type: ignore[attr-defined]
            raise DBAPIError("SELECT", None, orig)
        return 200

    sent = await call(app_of(handle, attempts=2, **READS))
    assert (attempts, sent[0]["status"]) == (2, 200)


async def test_a_request_that_has_written_beside_it_is_not(
    connect: DBConnect, database: Database, no_pauses: None
) -> None:
    async def handle(_: Scope) -> int:
        await (await db_session(connect)).execute(NAMES)
        await (await db_session(connect, read_only=False)).execute(insert(Item).values(name="a"))
        await commit_db_session(connect)
        orig = Exception()
        orig.sqlstate = "40001"  # type: ignore[attr-defined]
        raise DBAPIError("SELECT", None, orig)

    with pytest.raises(DBAPIError):
        await call(app_of(handle, attempts=2, **READS))
    assert await database.names() == ["a"]


@pytest.mark.parametrize("status", [200, 404])
async def test_other_methods_and_other_middlewares_write_as_before(
    connect: DBConnect, database: Database, status: int
) -> None:
    async def handle(scope: Scope) -> int:
        await add(connect, scope["path"])
        return status

    await call(app_of(handle), http_scope("a"))
    await call(app_of(handle, read_only_methods=["HEAD"]), http_scope("b"))
    assert await database.names() == (["a", "b"] if status == 200 else [])
