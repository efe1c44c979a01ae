"""The middleware, under pure ASGI applications and a real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    rollback_db_session,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.test_utils import set_test_context
from tests.conftest import Database
from tests.helpers.connections import connections_out
from tests.helpers.models import Item, Seat
from tests.helpers.serving import http_client, serve

Handler = Callable[[Scope], Awaitable[int]]


async def add(connect: DBConnect, *names: str) -> AsyncSession:
    session = await db_session(connect)
    await session.execute(insert(Item), [{"name": name} for name in names])
    return session


async def respond(send: Send, status: int = 200, body: bytes = b"") -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def app_of(handler: Handler, **options: Any) -> ASGIApp:
    """Make an application that answers with the status that `handler` returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await respond(send, await handler(scope))

    return ASGIHTTPDBSessionMiddleware(app, **options)


def http_scope(path: str = "/") -> Scope:
    return {"type": "http", "method": "GET", "path": path, "headers": []}


async def call(app: ASGIApp, scope: Scope | None = None) -> list[Message]:
    """Call `app` without a server; return what it sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope or http_scope(), receive, send)
    return sent


@pytest.mark.parametrize(
    ("status", "names"), [(200, ["a"]), (201, ["a"]), (303, ["a"]), (404, []), (500, [])]
)
async def test_the_status_of_the_response_decides(
    connect: DBConnect, database: Database, status: int, names: list[str]
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        return status

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/")).status_code == status
        assert await database.names() == names
        assert connections_out(connect) == 0


async def test_an_exception_rolls_back(connect: DBConnect, database: Database) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        raise ValueError("no")

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/")).status_code == 500
        assert await database.names() == []
        assert connections_out(connect) == 0


async def test_children_tasks_and_gather_share_the_session_of_the_request(
    connect: DBConnect, database: Database
) -> None:
    async def child() -> AsyncSession:
        return await db_session(connect)

    async def handler(_: Scope) -> int:
        first, second = await asyncio.gather(child(), child())
        sessions = {first, second, await child(), await asyncio.create_task(child())}
        assert len(sessions) == 1
        await add(connect, "a")
        return 200

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/")).status_code == 200
        assert await database.names() == ["a"]


async def test_two_hundred_concurrent_requests_are_apart(
    connect: DBConnect, database: Database
) -> None:
    sessions: list[AsyncSession] = []
    everyone_is_in = asyncio.Barrier(200)

    async def handler(scope: Scope) -> int:
        session = await db_session(connect)
        sessions.append(session)
        await everyone_is_in.wait()
        assert await db_session(connect) is session
        number = int(scope["path"][1:])
        await add(connect, str(number))
        return 200 if number % 2 else 400

    async with http_client(app_of(handler)) as client:
        responses = await asyncio.gather(*(client.get(f"/{n}") for n in range(200)))
    assert len(set(sessions)) == 200
    assert sorted(r.status_code for r in responses) == [200] * 100 + [400] * 100
    assert sorted(map(int, await database.names())) == list(range(1, 200, 2))


async def test_the_row_is_there_when_the_status_line_arrives(
    connect: DBConnect, database: Database
) -> None:
    release = asyncio.Event()

    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await add(connect, "a")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await release.wait()
        await send({"type": "http.response.body", "body": b"done"})

    async with serve(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        assert await database.names() == ["a"]
        assert connections_out(connect) == 0
        release.set()
        assert b"done" in await reader.read()
        writer.close()
        await writer.wait_closed()


async def test_a_commit_that_fails_is_not_a_success(connect: DBConnect, database: Database) -> None:
    async def handler(_: Scope) -> int:
        session = await db_session(connect)
        session.add_all([Seat(number=1), Seat(number=1)])
        await session.flush()
        return 200

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/")).status_code == 500
        assert await database.seats() == []
        assert connections_out(connect) == 0


async def test_an_application_that_catches_the_failed_commit_may_answer(
    connect: DBConnect, database: Database
) -> None:
    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=1)])
        try:
            await respond(send, 201)
        except IntegrityError:
            await respond(send, 409)

    assert [m["status"] for m in await call(app) if "status" in m] == [409]
    assert await database.seats() == []


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


async def test_commit_rollback_and_close_in_the_middle_of_a_request(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "committed")
        await commit_db_session(connect)
        await add(connect, "rolled back")
        await rollback_db_session(connect)
        await add(connect, "closed")
        await close_db_session(connect)
        assert connections_out(connect) == 0
        await add(connect, "lost with the status")
        return 400

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/")).status_code == 400
    assert await database.names() == ["committed"]


async def test_a_request_that_swallowed_a_failed_statement_is_no_success(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        with suppress(IntegrityError):
            await add(connect, "a")
        return 200

    async with http_client(app_of(handler)) as client:
        # PostgreSQL would answer COMMIT with ROLLBACK, and no driver would report it.
        assert (await client.get("/")).status_code == 500
    assert await database.names() == []


async def test_two_connects_in_one_request_share_its_fate(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    async def handler(scope: Scope) -> int:
        number = scope["path"][1:]
        assert await add(connect, f"{number} a") is not await add(second_connect, f"{number} b")
        return int(number)

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/200")).status_code == 200
        assert (await client.get("/400")).status_code == 400
    assert sorted(await database.names()) == ["200 a", "200 b"]


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_ten_pipelined_requests_are_ten_transactions(
    connect: DBConnect, database: Database, http: str
) -> None:
    sessions: list[AsyncSession] = []

    async def handler(scope: Scope) -> int:
        sessions.append(await add(connect, scope["path"]))
        return 400 if scope["path"] == "/3" else 200

    async with serve(app_of(handler), http=http) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        requests = [f"GET /{n} HTTP/1.1\r\nHost: a\r\n" for n in range(10)]
        requests[-1] += "Connection: close\r\n"
        writer.write("".join(f"{request}\r\n" for request in requests).encode())
        statuses = [line for line in (await reader.read()).split(b"\r\n") if b"HTTP/1.1" in line]
        writer.close()
        await writer.wait_closed()
    assert len(statuses) == 10
    assert statuses[3] == b"HTTP/1.1 400 Bad Request"
    assert len(set(sessions)) == 10
    assert await database.names() == [f"/{n}" for n in range(10) if n != 3]


async def test_an_inherited_context_is_not_joined(connect: DBConnect, database: Database) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "request")
        return 200

    async with new_db_session_ctx():
        session = await db_session(connect)
        await call(app_of(handler))
        assert await database.names() == ["request"]
        assert await db_session(connect) is session


async def test_a_nested_middleware_joins_the_request(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "inner")
        return 200

    inner = app_of(handler)

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        session = await add(connect, "outer")
        await inner({**scope, "root_path": "/mounted"}, receive, send)
        assert await db_session(connect) is session
        await add(connect, "after")

    await call(ASGIHTTPDBSessionMiddleware(outer))
    assert await database.names() == ["outer", "inner", "after"]


async def test_a_scope_that_is_used_again_gets_a_new_context(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, f"{len(await database.names())}")
        return 200

    app, scope = app_of(handler), http_scope()
    await call(app, scope)
    await call(app, scope)
    assert await database.names() == ["0", "1"]


async def test_a_test_context_is_joined_and_left_to_the_test(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        return 200

    async with set_test_context(auto_close=True):
        session = await db_session(connect)
        await call(app_of(handler))
        assert await database.names() == []
        assert await session.scalar(text("SELECT name FROM item")) == "a"
    assert await database.names() == []


async def test_a_task_that_outlives_its_request_is_refused(connect: DBConnect) -> None:
    ended = asyncio.Event()
    tasks: list[asyncio.Task[AsyncSession]] = []

    async def late() -> AsyncSession:
        await ended.wait()
        return await db_session(connect)

    async def handler(_: Scope) -> int:
        tasks.append(asyncio.create_task(late()))
        return 200

    async with http_client(app_of(handler)) as client:
        await client.get("/")
    ended.set()
    with pytest.raises(ContextClosedError, match="has ended"):
        await tasks[0]


async def test_a_request_that_never_asks_for_a_session_makes_no_engine(
    connect: DBConnect,
) -> None:
    async def handler(_: Scope) -> int:
        return 200

    async with http_client(app_of(handler)) as client:
        assert (await client.get("/")).status_code == 200
    assert connect.engine is None


async def test_a_response_that_was_never_started_rolls_back(
    connect: DBConnect, database: Database
) -> None:
    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await add(connect, "a")

    assert await call(app) == []
    assert await database.names() == []


async def test_a_cancelled_request_rolls_back(connect: DBConnect, database: Database) -> None:
    waiting = asyncio.Event()

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        waiting.set()
        await asyncio.Event().wait()
        return 200

    task = asyncio.create_task(call(app_of(handler)))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connections_out(connect) == 0
    assert await database.names() == []


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_other_scopes_get_no_context(connect: DBConnect, kind: str) -> None:
    errors: list[Exception] = []

    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await db_session(connect)
        except ContextNotInitiatedError as error:
            errors.append(error)

    await call(app, {"type": kind})
    assert "new_db_session_ctx" in str(errors[0])


async def test_commit_on_decides_for_the_user(connect: DBConnect, database: Database) -> None:
    async def handler(scope: Scope) -> int:
        await add(connect, scope["path"])
        return int(scope["path"][1:])

    app = app_of(handler, commit_on=lambda status: status in (200, 404))
    for status in (200, 201, 404):
        await call(app, http_scope(f"/{status}"))
    assert await database.names() == ["/200", "/404"]


async def test_before_commit_runs_before_each_commit_and_no_rollback(connect: DBConnect) -> None:
    before_commit = Mock(return_value=None)
    sessions = []

    async def handler(scope: Scope) -> int:
        sessions.append(await add(connect, scope["path"]))
        return int(scope["path"][1:])

    app = app_of(handler, before_commit=before_commit)
    await call(app, http_scope("/200"))
    await call(app, http_scope("/400"))
    before_commit.assert_called_once_with(sessions[0])


async def test_an_async_commit_on_is_refused() -> None:
    async def commit_on(_: int) -> bool:
        return False

    with pytest.raises(TypeError, match="commit_on must be a function"):
        ASGIHTTPDBSessionMiddleware(Mock(), commit_on=commit_on)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["before_commit", "commit_on"])
def test_an_option_that_is_not_callable_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a function"):
        ASGIHTTPDBSessionMiddleware(Mock(), **{name: 200})  # type: ignore[arg-type]


async def test_the_middleware_works_on_sqlite(sqlite_connect: DBConnect) -> None:
    async def handler(scope: Scope) -> int:
        await add(sqlite_connect, scope["path"])
        return int(scope["path"][1:])

    async with http_client(app_of(handler)) as client:
        statuses = [(await client.get(f"/{n}")).status_code for n in (200, 400, 201)]
    assert statuses == [200, 400, 201]
    async with new_db_session_ctx():
        rows = await (await db_session(sqlite_connect)).scalars(text("SELECT name FROM item"))
        assert rows.all() == ["/200", "/201"]
