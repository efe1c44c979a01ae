"""The body and the scope of a request are for each attempt what they were for the first."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from fastapi import Response
from fastapi.responses import PlainTextResponse
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request as StarletteRequest
from starlette.routing import Route

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import call, http_scope, respond
from tests.helpers.failures import ConflictError, Failing
from tests.helpers.frameworks import post, starlette_app
from tests.helpers.serving import http_client

pytestmark = pytest.mark.usefixtures("no_pauses")


def echo(fail: Callable[[], None], **options: Any) -> ASGIApp:
    """Make an application that answers with the body it read, unless it fails."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        fail()
        await respond(send, 200, body)

    return ASGIHTTPDBSessionMiddleware(app, attempts=3, **options)


async def test_the_body_is_replayed_exactly() -> None:
    body = bytes(range(256)) * 1024
    fail = Failing(2)

    async def chunks() -> AsyncGenerator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async with http_client(echo(fail), lifespan="off") as client:
        for content in (body, chunks(), b""):
            fail.calls = 0
            response = await client.post("/", content=content)
            assert response.status_code == 200
            assert response.content == (b"" if content == b"" else body)
            assert fail.calls == 3


async def test_a_body_that_an_attempt_has_not_read_to_its_end_is_replayed_too() -> None:
    body = b"x" * 500_000
    fail = Failing(1)
    read: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        if fail.calls == 0:
            fail()
        size = len(message["body"])
        while message.get("more_body", False):
            message = await receive()
            size += len(message["body"])
        read.append(size)
        await respond(send)

    middleware = ASGIHTTPDBSessionMiddleware(app, attempts=2)
    async with http_client(middleware, lifespan="off") as client:
        assert (await client.post("/", content=body)).status_code == 200
    assert read == [len(body)]


class FailFirst:
    """A middleware that fails before anybody has read the body, as a query of its own may."""

    def __init__(self, app: ASGIApp, fail: Callable[[], None]) -> None:
        self.app = app
        self.fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.fail()
        await self.app(scope, receive, send)


@pytest.mark.parametrize("size", [0, 10, 300_000, 900_000])
async def test_the_body_is_whole_behind_a_base_http_middleware(size: int) -> None:
    fail = Failing(2)

    async def endpoint(request: StarletteRequest) -> Response:
        return PlainTextResponse(await request.body())

    async def dispatch(request: StarletteRequest, call_next: Any) -> Any:
        return await call_next(request)

    app = Starlette(routes=[Route("/a", endpoint, methods=["POST"])])
    app.add_middleware(FailFirst, fail=fail)
    add_starlette_http_db_session_middleware(app, attempts=3)
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    body = bytes(range(250)) * (size // 250) or b"x" * size
    response = await post(app, content=body)
    assert (response.status_code, response.content == body) == (200, True)


async def test_a_body_whose_reading_the_application_cancels_is_not_replayed() -> None:
    runs = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal runs
        runs += 1
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await receive()
        raise ConflictError

    async def receive() -> Message:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(ConflictError) as info:
        middleware = ASGIHTTPDBSessionMiddleware(app, attempts=3)
        await middleware(http_scope(), receive, respond)  # type: ignore[arg-type]
    assert "cancelled the reading of its body" in info.value.__notes__[0]
    assert runs == 1


@pytest.mark.parametrize(("limit", "status", "runs"), [(1000, 200, 3), (999, 500, 1), (0, 500, 1)])
async def test_a_body_over_the_limit_is_not_replayed(limit: int, status: int, runs: int) -> None:
    fail = Failing(2)
    app = echo(fail, replay_body_limit=limit)
    async with http_client(app, lifespan="off") as client:
        response = await client.post("/", content=b"x" * 1000)
    assert response.status_code == status
    assert fail.calls == runs


async def test_a_body_over_the_limit_is_given_to_the_application_whole() -> None:
    body = bytes(range(256)) * 4096
    async with http_client(echo(Failing(0), replay_body_limit=10), lifespan="off") as client:
        assert (await client.post("/", content=body)).content == body


@pytest.mark.parametrize("part", [b"", b"x"])
async def test_a_flood_of_tiny_messages_costs_what_its_bytes_cost(part: bytes) -> None:
    # As hypercorn passes on the DATA frames of HTTP/2 and the chunks of HTTP/1.1, each by itself.
    count = 20_000
    fail, costs, bodies, left = Failing(1), list[int](), list[int](), count

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": bytes(part), "more_body": left > 0}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        before, more, size = tracemalloc.get_traced_memory()[0], True, 0
        while more:
            message = await receive()
            more, size = message["more_body"], size + len(message["body"])
        costs.append(tracemalloc.get_traced_memory()[0] - before)
        bodies.append(size)
        fail()
        await respond(send)

    async def send(_: Message) -> None: ...

    tracemalloc.start()
    try:
        await ASGIHTTPDBSessionMiddleware(app, attempts=2)(http_scope(), receive, send)
    finally:
        tracemalloc.stop()
    assert bodies == [len(part) * count] * 2
    assert max(costs) < 100_000


async def test_a_dictionary_of_a_class_of_its_own_is_restored_too() -> None:
    class Session(dict[str, str]):
        pass

    fail, tokens = Failing(1), list[str]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tokens.append(scope["session"].pop("csrf"))
        fail()
        await respond(send)

    session = Session(csrf="token")
    await call(ASGIHTTPDBSessionMiddleware(app, attempts=2), {**http_scope(), "session": session})
    assert tokens == ["token", "token"]


async def test_the_scope_is_as_it_was_for_each_attempt() -> None:
    fail = Failing(1)
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(
            {
                key: value.copy() if isinstance(value, (dict, list)) else value
                for key, value in scope.items()
                if not key.startswith("context_async_sqlalchemy")
            }
        )
        scope["path"] = "/changed"
        scope["route"] = "added"
        scope["headers"].append((b"added", b"1"))
        scope["state"]["added"] = fail.calls
        del scope["query_string"]
        fail()
        await respond(send)

    state = {"shared": 1}
    scope = {
        **http_scope(),
        "query_string": b"q=1",
        "headers": [(b"a", b"b")],
        "state": state,
    }
    await call(ASGIHTTPDBSessionMiddleware(app, attempts=2), scope)

    assert scopes[0] == scopes[1]
    assert scopes[1]["state"] == {"shared": 1}
    # What an outer middleware holds shows what the last attempt has put there.
    assert scope["route"] == "added"
    assert state == {"shared": 1, "added": 1}


async def test_a_mounted_application_is_found_again(connect: DBConnect) -> None:
    fail = Failing(2)

    async def endpoint(request: StarletteRequest) -> Response:
        fail()
        return PlainTextResponse(request.url.path)

    response = await post(starlette_app(endpoint, {}, attempts=3), "/mounted/a")
    assert (response.status_code, response.text) == (200, "/mounted/a")
