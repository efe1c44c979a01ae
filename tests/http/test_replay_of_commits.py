"""Commits that fail, with `attempts`: what answers, where, and how often."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import stamina
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.asgi import add, http_scope
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.failures import ConflictError, Failing

pytestmark = pytest.mark.usefixtures("no_pauses")


def fail_commits_of(before_commit: Failing) -> Any:
    """Return a `before_commit` that fails, as a COMMIT would."""

    async def fail(_: AsyncSession) -> None:
        before_commit()

    return fail


async def post(app: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/")


@pytest.mark.parametrize("tries_again", [True, False])
async def test_the_handler_of_a_failed_commit_has_the_session(
    connect: DBConnect, database: Database, tries_again: bool
) -> None:
    app = FastAPI()
    fail = Failing(3)
    add_fastapi_http_db_session_middleware(app, fail_commits_of(fail), attempts=3)

    @app.post("/")
    async def endpoint() -> None:
        await add(connect, "a")

    @app.exception_handler(ConflictError)
    async def handler(_: Request, __: Exception) -> JSONResponse:
        await add(connect, "by the handler")
        return JSONResponse({}, 503)

    # Without it, as in users' tests, stamina makes one attempt of whatever number was asked for.
    stamina.set_active(tries_again)
    try:
        assert (await post(app)).status_code == 503
    finally:
        stamina.set_active(True)
    assert fail.calls == (3 if tries_again else 1)
    assert await database.names() == []
    assert connections_out(connect) == 0


async def test_a_handler_that_fails_does_not_let_a_refused_commit_be_repeated(
    connect: DBConnect,
) -> None:
    app = FastAPI()
    calls: list[str] = []
    fail = Failing(9, KeyError)
    add_fastapi_http_db_session_middleware(app, fail_commits_of(fail), attempts=3)

    @app.post("/")
    async def endpoint() -> None:
        calls.append("endpoint")
        await add(connect, "a")

    @app.exception_handler(KeyError)
    async def handler(_: Request, __: Exception) -> JSONResponse:
        calls.append("handler")
        raise ConflictError

    assert (await post(app)).status_code == 500
    assert calls == ["endpoint", "handler"]


class OtherError(BaseException):
    """Neither an Exception nor the end of a task."""


@pytest.mark.parametrize("error", [OtherError(), BaseExceptionGroup("", [OtherError()])])
async def test_what_is_no_exception_comes_out_at_once_after_a_failed_commit(
    connect: DBConnect, error: BaseException
) -> None:
    calls = 0

    async def app(_: Scope, __: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        await add(connect, "a")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except ConflictError:
            raise error from None

    middleware = ASGIHTTPDBSessionMiddleware(app, fail_commits_of(Failing(9)), attempts=3)
    with pytest.raises(type(error)):
        await middleware(http_scope(), _receive, _send)
    assert calls == 1
    assert connections_out(connect) == 0


async def test_a_note_is_added_once(connect: DBConnect) -> None:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await add(connect, "a")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"12345", "more_body": True}

    middleware = ASGIHTTPDBSessionMiddleware(
        app, fail_commits_of(Failing(9)), attempts=3, replay_body_limit=4
    )
    with pytest.raises(ConflictError) as caught:
        await middleware(http_scope(), receive, _send)
    assert caught.value.__notes__ == ["Not tried again: its body is larger than 4 bytes."]


async def test_no_connection_is_held_while_an_answer_is_held_back(connect: DBConnect) -> None:
    held: list[int] = []
    fail = Failing(1)

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await add(connect, "a")
        try:
            fail()
        except ConflictError:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            held.append(connections_out(connect))
            await send({"type": "http.response.body"})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

    await ASGIHTTPDBSessionMiddleware(app, attempts=3)(http_scope(), _receive, _send)
    assert held == [0]
    assert fail.calls == 2


async def _receive() -> Any:
    return {"type": "http.request"}


async def _send(_: Any) -> None: ...
