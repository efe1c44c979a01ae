"""A mounted application answers a commit that fails as it answers a statement that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.starlette_utils import (
    add_starlette_http_db_session_middleware,
    starlette_http_db_session_middleware,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.late_start import Spawning

Handlers = dict[Any, Callable[..., Any]]
BACKGROUND: list[str] = []


def add_dispatch(app: Starlette) -> None:
    app.add_middleware(BaseHTTPMiddleware, dispatch=starlette_http_db_session_middleware)


def add_behind_another(app: Starlette) -> None:
    app.add_middleware(Spawning)
    add_starlette_http_db_session_middleware(app)


ADD = [add_starlette_http_db_session_middleware, add_dispatch, add_behind_another]


def mounted_in_starlette(mounted: Starlette, handlers: Handlers) -> Starlette:
    return Starlette(routes=[Mount("/mounted", mounted)], exception_handlers=handlers)


def mounted_in_fastapi(mounted: Starlette, handlers: Handlers) -> Starlette:
    app = FastAPI(exception_handlers=handlers)
    app.mount("/mounted", mounted)
    return app


def mounted_twice(mounted: Starlette, handlers: Handlers) -> Starlette:
    inner = Starlette(
        routes=[Mount("/", mounted)], exception_handlers={Exception: answer_of_another}
    )
    return mounted_in_fastapi(inner, handlers)


async def answer(_: Request, error: Exception) -> Response:
    task = BackgroundTask(BACKGROUND.append, "done")
    return JSONResponse({"mounted": type(error).__name__}, 507, background=task)


def answer_in_thread(_: Request, error: Exception) -> Response:
    return JSONResponse({"mounted": type(error).__name__}, 507)


async def answer_of_another(_: Request, __: Exception) -> Response:
    return JSONResponse({"another": "application"}, 500)


async def fail(_: Request, __: Exception) -> Response:
    raise KeyError("a handler")


def mounted_application(connect: DBConnect, handlers: Handlers, debug: bool = False) -> Starlette:
    """Make an application with one statement that fails, and one whose commit fails."""

    async def endpoint(request: Request) -> Response:
        session = await db_session(connect)
        await session.execute(text("INSERT INTO seat (number) VALUES (1), (1)"))
        if request.url.path.endswith("/statement"):
            await session.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
        return JSONResponse({})

    routes = [Route("/statement", endpoint), Route("/commit", endpoint)]
    return Starlette(routes=routes, exception_handlers=handlers, debug=debug)


async def answer_to(app: Starlette, path: str) -> tuple[int, str, str | None]:
    """Return the status and the start of an answer, and the error that the server logs."""
    raised: list[BaseException] = []

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:
            raised.append(error)

    transport = httpx.ASGITransport(noting)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get(path)
    assert len(raised) < 2
    return response.status_code, response.text[:25], type(raised[0]).__name__ if raised else None


@pytest.mark.parametrize("add_middleware", ADD)
@pytest.mark.parametrize("mount", [mounted_in_starlette, mounted_in_fastapi, mounted_twice])
@pytest.mark.parametrize(
    ("handlers", "debug", "status"),
    [
        ({Exception: answer}, False, 507),
        ({500: answer_in_thread}, False, 507),
        ({}, False, 500),
        ({Exception: answer}, True, 500),
        ({IntegrityError: fail, Exception: answer}, False, 507),
        ({IntegrityError: answer, Exception: fail}, False, 507),
    ],
)
async def test_a_commit_that_fails_is_answered_like_a_statement_that_fails(
    connect: DBConnect,
    database: Database,
    add_middleware: Any,
    mount: Callable[[Starlette, Handlers], Starlette],
    handlers: Handlers,
    debug: bool,
    status: int,
) -> None:
    app = mount(mounted_application(connect, handlers, debug), {Exception: answer_of_another})
    add_middleware(app)
    BACKGROUND.clear()
    of_statement = await answer_to(app, "/mounted/statement")
    has_run = BACKGROUND.copy()
    assert of_statement[0] == status
    assert await answer_to(app, "/mounted/commit") == of_statement
    assert has_run * 2 == BACKGROUND
    assert await database.seats() == []
    assert connections_out(connect) == 0


async def test_what_the_application_around_raises_is_its_own_to_answer(
    connect: DBConnect, database: Database
) -> None:
    app = mounted_application(connect, {Exception: answer})
    app.mount("/mounted", Starlette(exception_handlers={Exception: answer_of_another}))
    add_starlette_http_db_session_middleware(app)
    for path in ("/statement", "/commit"):
        assert await answer_to(app, path) == (507, '{"mounted":"IntegrityErro', "IntegrityError")
