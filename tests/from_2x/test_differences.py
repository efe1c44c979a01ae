"""What the page on 2.x says has changed is so.

Each request was sent to 2.1.9 as well when this was written. There, the client of the two kinds of
middleware was told, and the database had, what stands beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import httpx
import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.requests import Request

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    ContextClosedError,
    DBConnect,
    db_session,
)
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.database import Database, assert_clean
from tests.helpers.from_2x import add
from tests.helpers.models import Seat


def with_the_class(app: FastAPI) -> None:
    app.add_middleware(ASGIHTTPDBSessionMiddleware)


WITH_THE_HELPER = add_fastapi_http_db_session_middleware


def make_app(add_middleware: Callable[[FastAPI], None], connection: DBConnect) -> FastAPI:
    app = FastAPI()
    add_middleware(app)

    @app.exception_handler(IntegrityError)
    async def conflict(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({}, 409)

    @app.post("/commit-fails")
    async def fail_at_the_commit() -> None:
        (await db_session(connection)).add_all([Seat(number=1), Seat(number=1)])

    @app.post("/error-is-caught")
    async def catch_the_error() -> None:
        session = await add(connection, "caught")
        with suppress(DBAPIError):
            await session.execute(text("SELECT nothing"))

    @app.post("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(add, connection, "background")

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncGenerator[bytes]:
            yield b"one"
            await add(connection, "stream")
            yield b"two"

        return StreamingResponse(body())

    return app


@pytest.mark.parametrize(
    ("path", "add_middleware", "told", "stored"),
    [
        ("commit-fails", WITH_THE_HELPER, 409, []),  # 2.1.9: 500
        ("commit-fails", with_the_class, 500, []),  # 200, and nothing stored
        ("error-is-caught", WITH_THE_HELPER, 500, []),  # 200, and nothing stored
        ("error-is-caught", with_the_class, 500, []),  # 200, and nothing stored
        ("background", WITH_THE_HELPER, 200, ["background"]),  # 200, and nothing stored
        ("background", with_the_class, 200, ["background"]),  # the same
        ("stream", WITH_THE_HELPER, 200, ["stream"]),  # 200, and nothing stored
        ("stream", with_the_class, 200, ["stream"]),  # the same
    ],
)
async def test_what_a_client_is_told_is_what_is_stored(
    path: str,
    add_middleware: Callable[[FastAPI], None],
    told: int,
    stored: list[str],
    connection: DBConnect,
    database: Database,
) -> None:
    app = make_app(add_middleware, connection)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post(f"/{path}")).status_code == told
    assert await database.names() == stored
    assert await database.seats() == []
    await assert_clean(connection, database)


async def test_a_task_that_outlives_its_request_is_refused(
    connection: DBConnect, database: Database
) -> None:
    # 2.1.9 gave it a session, and its connection never came back.
    app, has_ended = FastAPI(), asyncio.Event()
    add_fastapi_http_db_session_middleware(app)
    tasks: list[asyncio.Task[object]] = []

    async def add_later() -> None:
        await has_ended.wait()
        await add(connection, "later")

    @app.post("/")
    async def start() -> None:
        await add(connection, "in time")
        tasks.append(asyncio.create_task(add_later()))

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        assert (await client.post("/")).status_code == 200
    has_ended.set()
    with pytest.raises(ContextClosedError):
        await tasks[0]
    assert await database.names() == ["in time"]
    await assert_clean(connection, database)
