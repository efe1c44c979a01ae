"""What is written in a streamed body, or after the response, is settled too."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from context_async_sqlalchemy import ASGIHTTPDBSessionMiddleware, DBConnect, db_session
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from tests.helpers.asgi import add, call, respond
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Seat
from tests.helpers.serving import http_client, serve


async def test_no_connection_is_held_while_a_client_reads_slowly(
    connect: DBConnect, database: Database
) -> None:
    size = 16 * 1024 * 1024
    ended = []

    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await add(connect, "a")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(16):
            await send({"type": "http.response.body", "body": bytes(size // 16), "more_body": True})
        await send({"type": "http.response.body"})
        ended.append(True)

    async with serve(app) as port:
        # The small buffer makes the server wait for this client.
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        assert not ended
        assert connections_out(connect) == 0
        assert await database.names() == ["a"]
        received = await reader.read()
        assert ended
        assert received.count(0) == size
        writer.close()
        await writer.wait_closed()


async def test_no_connection_is_held_while_work_goes_on_after_the_response(
    connect: DBConnect, database: Database
) -> None:
    release, finished = asyncio.Event(), asyncio.Event()

    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await add(connect, "before")
        await respond(send)
        await release.wait()
        await add(connect, "after")
        finished.set()

    async with http_client(app) as client:
        assert (await client.get("/")).status_code == 200
        assert connections_out(connect) == 0
        assert await database.names() == ["before"]
        release.set()
        await finished.wait()
    assert await database.names() == ["before", "after"]


async def test_work_after_the_response_that_raises_is_rolled_back(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await add(connect, "before")
        await respond(send)
        await add(connect, "after")
        raise ValueError("too late")

    with caplog.at_level(logging.ERROR, logger="uvicorn.error"):
        async with http_client(app) as client:
            assert (await client.get("/")).status_code == 200
    assert await database.names() == ["before"]
    assert "too late" in caplog.text


async def test_what_a_streamed_body_writes_is_committed_when_the_body_is_complete(
    connect: DBConnect, database: Database
) -> None:
    returned = asyncio.Event()

    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for name in "ab":
            await add(connect, name)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body"})
        await returned.wait()

    async with http_client(app) as client:
        assert (await client.get("/")).text == "xx"
        # The application has not returned yet.
        assert await database.names() == ["a", "b"]
        assert connections_out(connect) == 0
        returned.set()


async def test_a_streamed_body_whose_commit_fails_is_cut_off(
    connect: DBConnect, database: Database
) -> None:
    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=1)])
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body"})

    async with http_client(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/")
    assert await database.seats() == []


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("is_refused", [False, True])
async def test_what_a_body_of_a_known_length_writes_is_committed_before_its_last_byte(
    connect: DBConnect, database: Database, http: str, is_refused: bool
) -> None:
    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=2 - is_refused)])
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        # The client would have the whole of it, and the server has not been told so yet.
        await add(connect, "after it")
        await send({"type": "http.response.body"})

    async with http_client(app, http=http, log_level="critical") as client:
        if is_refused:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/")
        else:
            assert (await client.get("/")).text == "xx"
        assert await database.seats() == ([] if is_refused else [1, 2])
        assert await database.names() == ([] if is_refused else ["after it"])


async def test_a_response_that_is_not_completed_rolls_back_what_its_body_wrote(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await add(connect, "a")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await add(connect, "b")
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    await call(app)
    assert await database.names() == ["a"]
    assert "not completed" in caplog.text
