"""The middleware in a FastAPI application, served over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any
from unittest.mock import Mock

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import ContextClosedError, DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from tests.helpers.asgi import add
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.serving import http_client


def add_dispatch(app: FastAPI) -> None:
    app.middleware("http")(fastapi_http_db_session_middleware)


def add_other_middleware(app: FastAPI) -> None:
    @app.middleware("http")
    async def other(request: Any, call_next: Any) -> Any:
        return await call_next(request)


def add_inside_of_other_middleware(app: FastAPI) -> None:
    add_fastapi_http_db_session_middleware(app)
    add_other_middleware(app)


def add_outside_of_other_middleware(app: FastAPI) -> None:
    add_other_middleware(app)
    add_fastapi_http_db_session_middleware(app)


ASGI = [
    add_fastapi_http_db_session_middleware,
    add_inside_of_other_middleware,
    add_outside_of_other_middleware,
]
every_way = pytest.mark.parametrize("add_middleware", [*ASGI, add_dispatch])
Adder = Callable[[FastAPI], None]


def make_app(connect: DBConnect) -> FastAPI:
    """Make an application with a route for each thing that a request may do."""
    app = FastAPI()
    app.state.released = asyncio.Event()
    app.state.errors = asyncio.Queue()

    @app.get("/success")
    async def success() -> dict[str, str]:
        await add(connect, "a")
        return {}

    @app.get("/status", status_code=404)
    async def status() -> dict[str, str]:
        await add(connect, "a")
        return {}

    @app.get("/http-exception")
    async def http_exception() -> None:
        await add(connect, "a")
        raise HTTPException(404)

    @app.get("/exception")
    async def exception() -> None:
        await add(connect, "a")
        raise ValueError("no")

    @app.get("/commit-fails")
    async def commit_fails() -> dict[str, str]:
        session = await db_session(connect)
        await session.execute(text("INSERT INTO seat (number) VALUES (1), (1)"))
        return {}

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> dict[str, str]:
        async def work() -> None:
            await app.state.released.wait()
            try:
                await add(connect, "background")
            except ContextClosedError as error:
                app.state.errors.put_nowait(error)
            else:
                app.state.errors.put_nowait(None)

        await add(connect, "a")
        tasks.add_task(work)
        return {}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncGenerator[bytes]:
            yield b"x"
            await add(connect, "body")
            yield b"x"

        await add(connect, "a")
        return StreamingResponse(body())

    async def session_of_request() -> AsyncGenerator[AsyncSession]:
        session = await add(connect, "set up")
        yield session
        # FastAPI runs this before the response or after it, depending on its version.
        await add(connect, "torn down")

    @app.get("/dependency")
    async def dependency(
        session: AsyncSession = Depends(session_of_request),  # noqa: B008
    ) -> dict[str, str]:
        assert session is await add(connect, "a")
        return {}

    return app


@every_way
async def test_a_success_is_committed(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    app = make_app(connect)
    add_middleware(app)
    async with http_client(app) as client:
        assert (await client.get("/success")).status_code == 200
        assert await database.names() == ["a"]
        assert connections_out(connect) == 0


@every_way
@pytest.mark.parametrize(
    ("path", "status"),
    [("/status", 404), ("/http-exception", 404), ("/exception", 500), ("/commit-fails", 500)],
)
async def test_a_failure_is_rolled_back(
    connect: DBConnect, database: Database, add_middleware: Adder, path: str, status: int
) -> None:
    app = make_app(connect)
    add_middleware(app)
    async with http_client(app) as client:
        assert (await client.get(path)).status_code == status
        assert (await database.names(), await database.seats()) == ([], [])
        assert connections_out(connect) == 0


@every_way
async def test_a_streamed_body_is_covered(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    app = make_app(connect)
    add_middleware(app)
    async with http_client(app) as client:
        assert (await client.get("/stream")).text == "xx"
        assert await database.names() == ["a", "body"]


@pytest.mark.parametrize("add_middleware", ASGI)
async def test_a_background_task_is_committed_and_holds_no_connection_while_it_waits(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    app = make_app(connect)
    add_middleware(app)
    async with http_client(app) as client:
        assert (await client.get("/background")).status_code == 200
        assert connections_out(connect) == 0
        assert await database.names() == ["a"]
        app.state.released.set()
        assert await app.state.errors.get() is None
    assert await database.names() == ["a", "background"]


async def test_the_dispatch_function_refuses_a_background_task(
    connect: DBConnect, database: Database
) -> None:
    app = make_app(connect)
    add_dispatch(app)
    app.state.released.set()
    async with http_client(app) as client:
        assert (await client.get("/background")).status_code == 200
        assert "has ended" in str(await app.state.errors.get())
    assert await database.names() == ["a"]


@pytest.mark.parametrize("add_middleware", ASGI)
async def test_a_dependency_that_yields_shares_the_session(
    connect: DBConnect, database: Database, add_middleware: Adder
) -> None:
    app = make_app(connect)
    add_middleware(app)
    async with http_client(app) as client:
        assert (await client.get("/dependency")).status_code == 200
    assert await database.names() == ["set up", "a", "torn down"]


async def test_a_mounted_application_joins_the_request(
    connect: DBConnect, database: Database
) -> None:
    app, mounted = FastAPI(), make_app(connect)
    add_fastapi_http_db_session_middleware(mounted)
    add_fastapi_http_db_session_middleware(app)
    app.mount("/mounted", mounted)
    async with http_client(app) as client:
        assert (await client.get("/mounted/status")).status_code == 404
        assert (await client.get("/mounted/success")).status_code == 200
    assert await database.names() == ["a"]


async def test_before_commit_is_passed_on(connect: DBConnect) -> None:
    before_commit = Mock(return_value=None)
    app = make_app(connect)
    add_fastapi_http_db_session_middleware(app, before_commit)
    async with http_client(app) as client:
        assert (await client.get("/success")).status_code == 200
    before_commit.assert_called_once()


@every_way
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_commit_that_fails_reaches_the_exception_handlers(
    connect: DBConnect, database: Database, add_middleware: Adder, kind: str
) -> None:
    app = make_app(connect)
    add_middleware(app)

    if kind == "async":

        @app.exception_handler(IntegrityError)
        async def conflict(_: Request, error: IntegrityError) -> JSONResponse:
            return JSONResponse({"error": type(error).__name__}, 409)
    else:

        @app.exception_handler(IntegrityError)
        def sync_conflict(_: Request, error: IntegrityError) -> JSONResponse:
            return JSONResponse({"error": type(error).__name__}, 409)

    async with http_client(app) as client:
        response = await client.get("/commit-fails")
        assert (response.status_code, response.json()) == (409, {"error": "IntegrityError"})
        assert await database.seats() == []
