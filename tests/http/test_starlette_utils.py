"""The middleware in a Starlette application, served over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from context_async_sqlalchemy import (
    DBConnect,
    commit_after_response,
    db_session,
    is_context_initiated,
)
from context_async_sqlalchemy.starlette_utils import (
    StarletteHTTPDBSessionMiddleware,
    add_starlette_http_db_session_middleware,
    starlette_http_db_session_middleware,
)
from tests.helpers.asgi import add
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.serving import http_client
from tests.helpers.starlette_apps import ASGI, add_dispatch, app_of, every_way


@every_way
async def test_a_success_is_committed(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return JSONResponse({})

    async with http_client(app_of(endpoint, add_middleware)) as client:
        assert (await client.get("/")).status_code == 200
        assert await database.names() == ["a"]
        assert connections_out(connect) == 0


@every_way
@pytest.mark.parametrize("kind", ["status", "HTTPException", "exception"])
async def test_a_failure_is_rolled_back(
    connect: DBConnect, database: Database, add_middleware: Any, kind: str
) -> None:
    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        if kind == "HTTPException":
            raise HTTPException(404)
        if kind == "exception":
            raise ValueError("no")
        return JSONResponse({}, status_code=404)

    async with http_client(app_of(endpoint, add_middleware)) as client:
        assert (await client.get("/")).status_code == (500 if kind == "exception" else 404)
        assert await database.names() == []
        assert connections_out(connect) == 0


@every_way
async def test_a_commit_that_fails_is_not_a_success(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    async def endpoint(_: Request) -> Response:
        session = await db_session(connect)
        await session.execute(text("INSERT INTO seat (number) VALUES (1), (1)"))
        return JSONResponse({})

    async with http_client(app_of(endpoint, add_middleware)) as client:
        assert (await client.get("/")).status_code == 500
        assert await database.seats() == []
        assert connections_out(connect) == 0


@every_way
async def test_a_streamed_body_is_covered(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    async def body() -> AsyncGenerator[bytes]:
        yield b"x"
        await add(connect, "body")
        yield b"x"

    async def endpoint(_: Request) -> Response:
        await add(connect, "endpoint")
        return StreamingResponse(body())

    async with http_client(app_of(endpoint, add_middleware)) as client:
        assert (await client.get("/")).text == "xx"
        assert await database.names() == ["endpoint", "body"]
        assert connections_out(connect) == 0


@pytest.mark.parametrize("add_middleware", ASGI)
async def test_a_background_task_is_committed_and_holds_no_connection_while_it_waits(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    waiting, release, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def background() -> None:
        waiting.set()
        await release.wait()
        await add(connect, "background")
        finished.set()

    async def endpoint(_: Request) -> Response:
        await add(connect, "endpoint")
        return JSONResponse({}, background=BackgroundTask(background))

    async with http_client(app_of(endpoint, add_middleware)) as client:
        assert (await client.get("/")).status_code == 200
        await waiting.wait()
        assert connections_out(connect) == 0
        assert await database.names() == ["endpoint"]
        release.set()
        await finished.wait()
    assert await database.names() == ["endpoint", "background"]


@every_way
@pytest.mark.parametrize("writes", [False, True])
async def test_a_streamed_body_that_begins_with_a_statement_is_covered(
    connect: DBConnect, database: Database, add_middleware: Any, writes: bool
) -> None:
    async def body() -> AsyncGenerator[str]:
        for name in "bcd":
            await add(connect, name)
            yield name

    async def endpoint(_: Request) -> Response:
        if writes:
            await add(connect, "a")
        return StreamingResponse(body())

    async with http_client(app_of(endpoint, add_middleware)) as client:
        for number in range(10):
            response = await client.get("/")
            assert (response.status_code, response.text) == (200, "bcd"), number
            assert await database.names() == ([*"abcd"] if writes else [*"bcd"])
            assert connections_out(connect) == 0
            await database.empty()


async def test_the_body_of_the_dispatch_function_may_be_read_by_another_response(
    connect: DBConnect, database: Database
) -> None:
    async def body() -> AsyncGenerator[str]:
        yield "a"
        await add(connect, "a")

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(body())

    async def dispatch(request: Request, call_next: Any) -> Response:
        response: Any = await starlette_http_db_session_middleware(
            request, call_next, before_commit
        )
        assert not is_context_initiated()
        return StreamingResponse(response.body_iterator)

    async def before_commit(_: AsyncSession) -> None:
        assert is_context_initiated()

    app = app_of(endpoint, lambda app: app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch))
    async with http_client(app) as client:
        assert (await client.get("/")).text == "a"
        assert await database.names() == ["a"]
        assert connections_out(connect) == 0


@every_way
async def test_a_fake_of_a_session_that_begins_another_transaction_is_settled_again(
    add_middleware: Any,
) -> None:
    is_open = False
    session = AsyncMock(in_transaction=lambda: is_open)
    connect: Any = Mock(context_key="key", create_session=AsyncMock(return_value=session))

    async def write() -> None:
        nonlocal is_open
        assert await db_session(connect) is session
        is_open = True

    async def commit() -> None:
        nonlocal is_open
        is_open = False

    session.commit.side_effect = commit

    async def body() -> AsyncGenerator[str]:
        yield "a"
        await write()

    async def endpoint(_: Request) -> Response:
        await write()
        return StreamingResponse(body())

    async with http_client(app_of(endpoint, add_middleware)) as client:
        assert (await client.get("/")).text == "a"
    assert session.commit.await_count == 2


@every_way
@pytest.mark.parametrize("status", [200, 404])
async def test_a_mock_of_a_session_is_settled_once(add_middleware: Any, status: int) -> None:
    session = AsyncMock()
    connect: Any = Mock(context_key="key", create_session=AsyncMock(return_value=session))

    async def endpoint(_: Request) -> Response:
        await db_session(connect)
        return JSONResponse({}, status)

    async with http_client(app_of(endpoint, add_middleware)) as client:
        assert (await client.get("/")).status_code == status
    assert session.commit.await_count == (status == 200)
    assert session.rollback.await_count == (status == 404)
    session.close.assert_awaited_once_with()


@every_way
async def test_a_mounted_application_joins_the_request(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return JSONResponse({})

    mounted = app_of(endpoint, add_starlette_http_db_session_middleware)
    app = Starlette(routes=[Mount("/mounted", app=mounted)])
    add_middleware(app)
    async with http_client(app) as client:
        assert (await client.get("/mounted/")).status_code == 200
        assert await database.names() == ["a"]


async def test_the_class_can_be_given_as_middleware(connect: DBConnect, database: Database) -> None:
    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return JSONResponse({}, status_code=404)

    def always(_: int) -> bool:
        return True

    app = Starlette(
        routes=[Route("/", endpoint)],
        middleware=[Middleware(StarletteHTTPDBSessionMiddleware, commit_on=always)],
    )
    async with http_client(app) as client:
        assert (await client.get("/")).status_code == 404
    assert await database.names() == ["a"]


@pytest.mark.parametrize("way", ["helper", "dispatch"])
async def test_before_commit_is_passed_on(connect: DBConnect, way: str) -> None:
    before_commit = Mock(return_value=None)

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return JSONResponse({})

    app = Starlette(routes=[Route("/", endpoint)])
    if way == "helper":
        add_starlette_http_db_session_middleware(app, before_commit)
    else:
        dispatch = partial(starlette_http_db_session_middleware, before_commit=before_commit)
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    async with http_client(app) as client:
        assert (await client.get("/")).status_code == 200
    before_commit.assert_called_once()


def app_with_handlers(
    connect: DBConnect, add_middleware: Any, handlers: dict[Any, Any], before_commit: Any = None
) -> Starlette:
    """Make an application whose every commit fails, with these exception handlers."""

    async def endpoint(request: Request) -> Response:
        assert await request.body() == b"seat"
        session = await db_session(connect)
        await session.execute(text("INSERT INTO seat (number) VALUES (1), (1)"))
        return JSONResponse({})

    app = Starlette(
        routes=[Route("/", endpoint, methods=["POST"])],
        exception_handlers=handlers,
    )
    add_middleware(app)
    return app


async def async_conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": type(error).__name__, "path": request.url.path}, 409)


def sync_conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": type(error).__name__, "path": request.url.path}, 409)


@every_way
@pytest.mark.parametrize("handler", [async_conflict, sync_conflict])
@pytest.mark.parametrize("registered", [IntegrityError, DBAPIError])
async def test_a_commit_that_fails_reaches_the_exception_handlers(
    connect: DBConnect, database: Database, add_middleware: Any, handler: Any, registered: Any
) -> None:
    app = app_with_handlers(connect, add_middleware, {registered: handler})
    async with http_client(app) as client:
        response = await client.post("/", content=b"seat")
        assert response.status_code == 409
        assert response.json() == {"error": "IntegrityError", "path": "/"}
        assert await database.seats() == []
        assert connections_out(connect) == 0


@every_way
async def test_a_commit_that_fails_without_a_handler_for_it_is_a_server_error(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    handled = []

    async def server_error(_: Request, error: Exception) -> Response:
        handled.append(type(error))
        return Response(status_code=503)

    handlers = {KeyError: async_conflict, Exception: server_error}
    app = app_with_handlers(connect, add_middleware, handlers)
    async with http_client(app) as client:
        assert (await client.post("/", content=b"seat")).status_code == 503
        assert handled == [IntegrityError]


@pytest.mark.parametrize("registered", [HTTPException, 409])
async def test_a_refusal_of_before_commit_reaches_the_exception_handlers(
    connect: DBConnect, database: Database, registered: Any
) -> None:
    async def handle(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"detail": error.detail}, error.status_code)

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return JSONResponse({})

    app = Starlette(routes=[Route("/", endpoint)], exception_handlers={registered: handle})
    before_commit = Mock(side_effect=HTTPException(409, "closed for today"))
    add_starlette_http_db_session_middleware(app, before_commit)
    async with http_client(app) as client:
        response = await client.get("/")
        assert response.status_code == 409
        assert response.json() == {"detail": "closed for today"}
    assert await database.names() == []


@pytest.mark.parametrize("add_middleware", [add_starlette_http_db_session_middleware, add_dispatch])
async def test_a_handler_of_a_failed_commit_may_use_the_database(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    async def handle(_: Request, __: Exception) -> Response:
        await add(connect, "rolled back with the status")
        return Response(status_code=409)

    app = app_with_handlers(connect, add_middleware, {IntegrityError: handle})
    async with http_client(app) as client:
        assert (await client.post("/", content=b"seat")).status_code == 409
    assert await database.names() == []


@every_way
async def test_the_handlers_of_a_mounted_application_come_first(
    connect: DBConnect, database: Database, add_middleware: Any
) -> None:
    async def outer(_: Request, __: Exception) -> Response:
        return Response(status_code=500)

    mounted = app_with_handlers(connect, lambda _: None, {IntegrityError: async_conflict})
    app = Starlette(
        routes=[Mount("/mounted", app=mounted)], exception_handlers={IntegrityError: outer}
    )
    add_middleware(app)
    async with http_client(app) as client:
        assert (await client.post("/mounted/", content=b"seat")).status_code == 409


@every_way
@pytest.mark.parametrize(("status", "names"), [(200, ["a", "b"]), (404, [])])
async def test_a_request_may_be_committed_after_its_response(
    connect: DBConnect, database: Database, add_middleware: Any, status: int, names: list[str]
) -> None:
    async def endpoint(_: Request) -> Response:
        commit_after_response()
        session = await add(connect, "a", "b")
        # A cursor on the server, which a commit would close.
        cursor = await session.stream(text("SELECT name FROM item ORDER BY id"))

        async def body() -> AsyncGenerator[str]:
            assert await database.names() == []
            async for name in cursor.scalars():
                yield name

        return StreamingResponse(body(), status_code=status)

    async with http_client(app_of(endpoint, add_middleware)) as client:
        response = await client.get("/")
        assert (response.status_code, response.text) == (status, "ab")
    assert connections_out(connect) == 0
    assert await database.names() == names
