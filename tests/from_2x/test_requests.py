"""Applications and tests written for 2.1.9, which did the same there, run unchanged."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import (
    AsyncSession,
)
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    auto_commit_by_status_code,
    close_db_session,
    commit_db_session,
    init_db_session_ctx,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
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
from tests.helpers.database import Database
from tests.helpers.from_2x import add
from tests.helpers.models import Item

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
