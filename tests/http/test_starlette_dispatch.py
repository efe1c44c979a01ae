"""The dispatch function, which BaseHTTPMiddleware calls for each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from httpx import RemoteProtocolError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from context_async_sqlalchemy import (
    ContextClosedError,
    DBConnect,
    commit_after_response,
    db_session,
    is_context_initiated,
)
from context_async_sqlalchemy.starlette_utils import starlette_http_db_session_middleware
from tests.helpers.asgi import add, http_scope
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Seat
from tests.helpers.serving import http_client
from tests.helpers.starlette_apps import add_dispatch, app_of


async def test_the_dispatch_function_refuses_a_background_task(
    connect: DBConnect, database: Database
) -> None:
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def background() -> None:
        try:
            await add(connect, "background")
        except ContextClosedError as error:
            errors.put_nowait(error)

    async def endpoint(_: Request) -> Response:
        await add(connect, "endpoint")
        return JSONResponse({}, background=BackgroundTask(background))

    async with http_client(app_of(endpoint, add_dispatch)) as client:
        assert (await client.get("/")).status_code == 200
        assert "has ended" in str(await errors.get())
    assert await database.names() == ["endpoint"]


async def test_the_dispatch_function_ends_the_context_of_a_client_that_left(
    connect: DBConnect, database: Database
) -> None:
    streaming, closed = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncGenerator[bytes]:
        try:
            yield b"x"
            await add(connect, "lost")
            streaming.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(body())

    app = app_of(endpoint, add_dispatch)

    async def receive() -> dict[str, Any]:
        await streaming.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            await streaming.wait()
            raise OSError("the client has gone")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "GET",
        "path": "/",
        "headers": [],
        "query_string": b"",
    }
    with pytest.raises((OSError, ClientDisconnect)):
        await app(scope, receive, send)
    assert closed.is_set()
    assert connections_out(connect) == 0
    assert await database.names() == []


async def test_the_dispatch_function_takes_a_response_that_is_not_streamed(
    connect: DBConnect, database: Database
) -> None:
    async def call_next(_: Request) -> Response:
        await add(connect, "a")
        return JSONResponse({})

    response = await starlette_http_db_session_middleware(Request(http_scope()), call_next)
    assert response.status_code == 200
    assert not is_context_initiated()
    assert await database.names() == ["a"]


async def test_the_dispatch_function_takes_a_mock_of_a_response() -> None:
    response = Mock(status_code=200)
    call_next = AsyncMock(return_value=response)
    given = await starlette_http_db_session_middleware(Request(http_scope()), call_next)
    assert given is response


async def test_the_dispatch_function_takes_a_streamed_response_of_another_class(
    connect: DBConnect, database: Database
) -> None:
    async def body() -> AsyncGenerator[str]:
        yield "b"

    async def call_next(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body())

    async def dispatch(request: Request, _: Any) -> Response:
        return await starlette_http_db_session_middleware(request, call_next)

    app = Starlette(middleware=[Middleware(BaseHTTPMiddleware, dispatch=dispatch)])
    async with http_client(app) as client:
        assert (await client.get("/")).text == "b"
        assert await database.names() == ["a"]


@pytest.mark.parametrize("is_refused", [False, True])
async def test_the_dispatch_function_commits_before_the_last_byte_of_a_known_length(
    connect: DBConnect, database: Database, is_refused: bool
) -> None:
    async def body() -> AsyncGenerator[str]:
        yield "é"
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=2 - is_refused)])
        yield "x"
        await add(connect, "after it")

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(body(), headers={"content-length": "3"})

    async with http_client(app_of(endpoint, add_dispatch), log_level="critical") as client:
        if is_refused:
            with pytest.raises(RemoteProtocolError):
                await client.get("/")
        else:
            assert (await client.get("/")).text == "éx"
    assert await database.seats() == ([] if is_refused else [1, 2])
    assert await database.names() == ([] if is_refused else ["after it"])


@pytest.mark.parametrize("reads", [False, True])
async def test_the_dispatch_function_ends_the_context_if_the_body_is_replaced(
    connect: DBConnect, database: Database, reads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sessions: list[AsyncSession] = []

    async def endpoint(_: Request) -> Response:
        commit_after_response()
        await add(connect, "a")
        sessions.append(await db_session(connect))
        return StreamingResponse(parts(b"a"))

    async def parts(part: bytes) -> AsyncGenerator[bytes]:
        yield part

    async def dispatch(request: Request, call_next: Any) -> Response:
        response: Any = await starlette_http_db_session_middleware(request, call_next)
        if reads:
            async for _ in response.body_iterator:
                pass
        response.body_iterator = parts(b"b")
        return response  # type: ignore[no-any-return]

    app = app_of(endpoint, lambda app: app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch))
    async with http_client(app) as client:
        assert (await client.get("/")).text == "b"
    [session] = sessions
    assert not session.in_transaction()
    assert await database.names() == (["a"] if reads else [])
    assert ("what is not committed is rolled back" in caplog.text) is not reads
