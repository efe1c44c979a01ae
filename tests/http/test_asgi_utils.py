"""The middleware settles a request by its status and its errors, before its response."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from unittest.mock import Mock

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    rollback_db_session,
)
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from tests.helpers.asgi import add, app_of, call, http_scope, respond
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Seat
from tests.helpers.serving import http_client, serve


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
