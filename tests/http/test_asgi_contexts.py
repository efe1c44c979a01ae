"""Each request has a context of its own, and who begins where it ends."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import suppress

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy._unit.context import DBSessionContext, current_context
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from context_async_sqlalchemy.test_utils import set_test_context
from tests.helpers.asgi import add, app_of, call, http_scope
from tests.helpers.database import Database, checked_connect
from tests.helpers.late_start import Holding
from tests.helpers.serving import http_client, serve


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
    database_url: URL, database: Database
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

    async with (
        checked_connect(database_url, database, pool_timeout=120) as connect,
        http_client(app_of(handler)) as client,
    ):
        client.timeout = 120  # all wait for the last one, and a machine may be busy
        responses = await asyncio.gather(*(client.get(f"/{n}") for n in range(200)))
    assert len(set(sessions)) == 200
    assert sorted(r.status_code for r in responses) == [200] * 100 + [400] * 100
    assert sorted(map(int, await database.names())) == list(range(1, 200, 2))


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

    async with set_test_context():
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


@pytest.mark.parametrize("raises", [False, True])
async def test_nothing_of_a_request_is_left_to_the_garbage_collector(
    connect: DBConnect, raises: bool
) -> None:
    contexts: list[weakref.ref[DBSessionContext]] = []

    async def handler(_: Scope) -> int:
        await db_session(connect)
        contexts.append(weakref.ref(current_context()))
        if raises:
            raise KeyError
        return 200

    gc.disable()
    try:
        with suppress(KeyError):
            await call(ASGIHTTPDBSessionMiddleware(Holding(app_of(handler))))
        assert [context() for context in contexts] == [None]
    finally:
        gc.enable()
