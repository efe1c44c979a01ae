"""Requests that are never given to the application again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psutil
import pytest
from fastapi import Response
from fastapi.responses import PlainTextResponse
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from starlette.requests import Request as StarletteRequest

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    CommitOutcomeUnknownError,
    DBConnect,
    atomic_db_session,
    commit_db_session,
    on_commit,
)
from context_async_sqlalchemy.asgi_types import Message, Receive, Scope, Send
from tests.helpers.asgi import add, app_of, call, http_scope, respond
from tests.helpers.cancelling import cancel_at
from tests.helpers.database import Database, make_connect
from tests.helpers.failures import ConflictError, Failing
from tests.helpers.frameworks import every_framework, post
from tests.helpers.postgres import free_port
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.serving import http_client, serve

pytestmark = pytest.mark.usefixtures("no_pauses")


async def test_another_error_is_not_tried_again(connect: DBConnect) -> None:
    fail = Failing(1, ValueError)

    async def handler(_: Scope) -> int:
        fail()
        return 200

    with pytest.raises(ValueError):  # noqa: PT011
        await call(app_of(handler, attempts=3))
    assert fail.calls == 1


async def test_an_error_says_why_it_was_not_tried_again() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise ConflictError

    async def receive() -> Message:
        return {"type": "http.request", "body": b"12345", "more_body": True}

    middleware = ASGIHTTPDBSessionMiddleware(app, attempts=3, replay_body_limit=4)
    with pytest.raises(ConflictError) as info:
        await middleware(http_scope(), receive, respond)  # type: ignore[arg-type]
    assert info.value.__notes__ == ["Not tried again: its body is larger than 4 bytes."]


@pytest.mark.parametrize("reads", [True, False])
async def test_a_request_whose_client_has_left_is_not_tried_again(reads: bool) -> None:
    runs = 0
    running, left, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal runs
        runs += 1
        if reads:
            await receive()
        running.set()
        await left.wait()
        raise ConflictError

    middleware = ASGIHTTPDBSessionMiddleware(app, attempts=3)

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        async def note() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                seen.append(message)
            return message

        seen: list[Message] = []
        try:
            await middleware(scope, note, send)
        finally:
            assert len(seen) == 1
            ended.set()

    async with serve(noting, lifespan="off", log_level="critical") as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        await running.wait()
        writer.transport.abort()
        # The server has noticed when it has closed its end.
        async with asyncio.timeout(30):
            while not await no_connection_to(port):
                await asyncio.sleep(0.001)
        left.set()
        async with asyncio.timeout(30):
            await ended.wait()
    assert runs == 1


async def no_connection_to(port: int) -> bool:
    """Return whether nobody in this process has a connection that was accepted on `port`."""
    return not any(
        c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED
        for c in psutil.Process().net_connections("tcp")
        if c.laddr
    )


@pytest.mark.parametrize("sent", ["start", "part of the body", "early hints"])
async def test_nothing_is_tried_again_once_something_was_sent(
    connect: DBConnect, sent: str
) -> None:
    fail = Failing(1)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if sent == "early hints":
            await send({"type": "http.response.early_hint", "links": []})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if sent == "part of the body":
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        fail()

    with pytest.raises(ConflictError):
        await call(ASGIHTTPDBSessionMiddleware(app, attempts=3))
    assert fail.calls == 1


async def test_work_after_the_response_is_not_tried_again(
    connect: DBConnect, database: Database
) -> None:
    runs = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal runs
        runs += 1
        await add(connect, "a")
        await respond(send)
        raise ConflictError

    with pytest.raises(ConflictError):
        await call(ASGIHTTPDBSessionMiddleware(app, attempts=3))
    assert runs == 1
    assert await database.names() == ["a"]


async def test_a_commit_with_an_unknown_outcome_is_not_tried_again(
    database_url: URL, database: Database
) -> None:
    runs = 0
    async with losing_commits(database_url) as lossy:

        async def handler(_: Scope) -> int:
            nonlocal runs
            runs += 1
            await add(lossy, f"run {runs}")
            return 200

        async with http_client(app_of(handler, attempts=3)) as client:
            assert (await client.get("/")).status_code == 500
    assert await database.names() == ["run 1"]


async def test_a_request_of_which_a_part_was_committed_is_not_tried_again(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        await commit_db_session(connect)
        raise ConflictError

    with pytest.raises(ConflictError) as info:
        await call(app_of(handler, attempts=3))
    assert "had been committed" in info.value.__notes__[0]
    assert await database.names() == ["a"]


async def test_a_request_of_which_one_database_was_committed_is_not_tried_again(
    connect: DBConnect, database_url: URL, database: Database
) -> None:
    async def fail_commit(call: Call) -> Fault | None:
        return Fault.ERROR if call.statement.startswith("COMMIT") else None

    runs = 0
    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, fail_commit) as port:
        failing = make_connect(database_url.set(host="127.0.0.1", port=port))

        async def handler(_: Scope) -> int:
            nonlocal runs
            runs += 1
            await add(connect, f"run {runs}")
            await add(failing, f"run {runs}, other database")
            return 200

        with pytest.raises(DBAPIError, match="injected") as info:
            await call(app_of(handler, attempts=3))
        assert any("Not tried again" in note for note in info.value.__notes__)
        await failing.close()
    assert await database.names() == ["run 1"]


async def test_a_lost_commit_that_the_application_swallowed_is_not_repeated(
    database_url: URL, database: Database
) -> None:
    async with losing_commits(database_url) as lossy:
        runs = 0

        async def handler(_: Scope) -> int:
            nonlocal runs
            runs += 1
            with suppress(CommitOutcomeUnknownError):
                async with atomic_db_session(lossy):
                    await add(lossy, f"run {runs}")
            raise ConflictError

        with pytest.raises(ConflictError) as info:
            await call(app_of(handler, attempts=3))
    assert "or may have been" in info.value.__notes__[0]
    assert await database.names() == ["run 1"]


async def test_a_lost_commit_is_not_repeated_whatever_is_raised_while_looking_after_it(
    database_url: URL, database: Database
) -> None:
    async with losing_commits(database_url) as lossy:
        runs = 0

        async def handler(_: Scope) -> int:
            nonlocal runs
            runs += 1
            session = await add(lossy, f"run {runs}")
            try:
                await session.commit()
            except DBAPIError:
                await session.rollback()
            async with make_connect(database_url.set(port=free_port())) as away:
                await away.ping()
            return 200

        with pytest.raises(ConnectionRefusedError) as info:
            await call(app_of(handler, attempts=3))
    assert "or may have been" in info.value.__notes__[0]
    assert await database.names() == ["run 1"]


async def test_a_commit_below_the_session_is_seen(connect: DBConnect, database: Database) -> None:
    async def handler(_: Scope) -> int:
        session = await add(connect, "a")
        await (await session.connection()).commit()
        raise ConflictError

    with pytest.raises(ConflictError) as info:
        await call(app_of(handler, attempts=3))
    assert "had been committed" in info.value.__notes__[0]
    assert await database.names() == ["a"]


async def test_a_commit_that_was_cancelled_is_not_repeated(
    connect: DBConnect, database: Database
) -> None:
    runs = 0

    async def handler(_: Scope) -> int:
        nonlocal runs
        runs += 1
        session = await add(connect, f"run {runs}")
        await cancel_at(1, session.commit(), "asyncio", pause=0.05)
        await session.rollback()
        raise ConflictError

    with pytest.raises(ConflictError):
        await call(app_of(handler, attempts=3))
    assert runs == 1
    assert await database.names() == ["run 1"]


async def test_callbacks_that_have_run_are_not_called_again(connect: DBConnect) -> None:
    called: list[int] = []

    async def handler(_: Scope) -> int:
        async with atomic_db_session(connect):
            on_commit(connect, lambda: called.append(1))
        raise ConflictError

    with pytest.raises(ConflictError):
        await call(app_of(handler, attempts=3))
    assert called == [1]


async def test_another_service_that_hangs_up_is_none_of_our_business(connect: DBConnect) -> None:
    runs = 0

    async def handler(_: Scope) -> int:
        nonlocal runs
        runs += 1
        await add(connect, "a")
        await asyncio.open_connection("127.0.0.1", free_port())
        return 200

    with pytest.raises(ConnectionRefusedError):
        await call(app_of(handler, attempts=3))
    assert runs == 1


async def test_an_error_that_somebody_around_the_application_handles_is_not_ours() -> None:
    runs = 0

    async def handler(_: Scope) -> int:
        nonlocal runs
        runs += 1
        return 404

    app = app_of(handler, attempts=3)
    try:
        raise ConflictError
    except ConflictError:
        await call(app)
    assert runs == 1


@asynccontextmanager
async def losing_commits(database_url: URL) -> AsyncGenerator[DBConnect]:
    """Make a connect whose connection is lost after each COMMIT, before its answer."""

    async def lose_commit(call: Call) -> Fault | None:
        return Fault.LOST_AFTER if call.statement.startswith("COMMIT") else None

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, lose_commit) as port:
        lossy = make_connect(database_url.set(host="127.0.0.1", port=port))
        yield lossy
        await lossy.close()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
async def test_the_end_of_the_process_is_not_tried_again(end: type[BaseException]) -> None:
    fail = Failing(99)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            fail()
        except ConflictError:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            raise end from None

    with pytest.raises(end):
        await call(ASGIHTTPDBSessionMiddleware(app, attempts=3))
    assert fail.calls == 1


@every_framework
async def test_an_answer_that_an_endpoint_gives_itself_is_not_tried_again(
    connect: DBConnect, make_app: Any
) -> None:
    fail = Failing(99)

    async def endpoint(_: StarletteRequest) -> Response:
        try:
            fail()
        except ConflictError:
            return PlainTextResponse("busy", 409)
        return PlainTextResponse("ok")

    assert (await post(make_app(endpoint, {}, attempts=3))).status_code == 409
    assert fail.calls == 1
