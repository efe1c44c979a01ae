"""Requests that the middleware gives to the application again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import stamina
from fastapi import Response
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy import URL, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.background import BackgroundTask
from starlette.requests import Request as StarletteRequest

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    ContextClosedError,
    DBConnect,
    atomic_db_session,
    commit_db_session,
    db_session,
    is_context_initiated,
    new_db_session_ctx,
    on_commit,
    rollback_db_session,
)
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from tests.helpers.asgi import add, app_of, call, respond
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, checked_connect
from tests.helpers.failures import ConflictError, Failing
from tests.helpers.frameworks import every_framework, post
from tests.helpers.models import Item, Seat
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.serving import http_client

pytestmark = pytest.mark.usefixtures("no_pauses")


async def test_a_request_that_fails_for_the_moment_is_tried_again(
    connect: DBConnect, database: Database
) -> None:
    fail, called = Failing(2), list[str]()

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        on_commit(connect, lambda: called.append("a"))
        fail()
        return 201

    async with http_client(app_of(handler, attempts=3)) as client:
        assert (await client.get("/")).status_code == 201
    assert await database.names() == ["a"]
    assert called == ["a"]
    assert fail.calls == 3


async def test_a_request_whose_commit_fails_to_serialize_is_tried_again(
    database_url: URL, database: Database
) -> None:
    async with checked_connect(database_url, database, isolation_level="SERIALIZABLE") as connect:
        everyone_has_read = asyncio.Barrier(2)
        runs = 0

        async def handler(scope: Scope) -> int:
            nonlocal runs
            runs += 1
            session = await db_session(connect)
            await session.execute(text("SELECT count(*) FROM item"))
            if runs <= 2:
                await everyone_has_read.wait()
            await session.execute(insert(Item).values(name=scope["path"]))
            return 201

        async with http_client(app_of(handler, attempts=2)) as client:
            responses = await asyncio.gather(client.get("/a"), client.get("/b"))
        assert [r.status_code for r in responses] == [201, 201]
        assert runs == 3
        assert sorted(await database.names()) == ["/a", "/b"]


async def test_the_last_error_is_raised_and_nothing_is_left(
    connect: DBConnect, database: Database
) -> None:
    errors = [ConflictError(str(number)) for number in range(3)]
    raised = iter(errors)

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        raise next(raised)

    with pytest.raises(ConflictError) as info:
        await call(app_of(handler, attempts=3))
    assert info.value is errors[-1]
    assert not getattr(info.value, "__notes__", [])
    assert await database.names() == []
    assert connections_out(connect) == 0


async def test_a_commit_that_the_server_refused_is_repeated(
    connect: DBConnect, database: Database
) -> None:
    runs = 0

    async def handler(_: Scope) -> int:
        nonlocal runs
        runs += 1
        session = await db_session(connect)
        session.add_all([Seat(number=1), Seat(number=1 if runs == 1 else 2)])
        try:
            await commit_db_session(connect)
        except IntegrityError:
            await rollback_db_session(connect)
            raise ConflictError from None
        return 200

    await call(app_of(handler, attempts=3))
    assert runs == 2
    assert await database.seats() == [1, 2]


@every_framework
async def test_the_background_work_of_an_answer_that_is_not_sent_is_not_done(
    make_app: Any,
) -> None:
    fail, done = Failing(99), list[int]()

    async def answer(_: Any, error: Exception) -> Response:
        return JSONResponse({}, 503, background=BackgroundTask(done.append, fail.calls))

    async def endpoint(_: StarletteRequest) -> Response:
        fail()
        return PlainTextResponse("ok")

    response = await post(make_app(endpoint, {ConflictError: answer}, attempts=3))
    assert response.status_code == 503
    assert done == [3]


@every_framework
async def test_the_helpers_try_again_too(
    connect: DBConnect, database: Database, make_app: Any
) -> None:
    fail = Failing(2)

    async def endpoint(request: StarletteRequest) -> Response:
        await add(connect, request.path_params["name"])
        body = await request.body()
        fail()
        return PlainTextResponse(body, 201)

    response = await post(make_app(endpoint, {}, attempts=3), content=b"body")
    assert (response.status_code, response.content) == (201, b"body")
    assert await database.names() == ["a"]


@every_framework
@pytest.mark.parametrize(
    ("failures", "status", "names"), [(2, 201, ["a"]), (3, 503, []), (99, 503, [])]
)
@pytest.mark.parametrize("is_async", [True, False])
async def test_an_exception_handler_answers_the_last_attempt_only(
    connect: DBConnect,
    database: Database,
    make_app: Any,
    failures: int,
    status: int,
    names: list[str],
    is_async: bool,
) -> None:
    fail = Failing(failures)

    def answer(_: Any, error: Exception) -> Response:
        return JSONResponse({"error": type(error).__name__}, 503)

    async def async_answer(request: Any, error: Exception) -> Response:
        return answer(request, error)

    async def endpoint(_: StarletteRequest) -> Response:
        await add(connect, "a")
        fail()
        return PlainTextResponse("ok", 201)

    handlers = {ConflictError: async_answer if is_async else answer}
    response = await post(make_app(endpoint, handlers, attempts=3))
    assert response.status_code == status
    if status == 503:
        assert response.json() == {"error": "ConflictError"}
    assert await database.names() == names
    assert fail.calls == 3


@every_framework
@pytest.mark.parametrize("switch", ["testing", "inactive"])
async def test_an_answer_is_sent_if_stamina_gives_up_earlier(make_app: Any, switch: str) -> None:
    fail = Failing(99)

    async def answer(_: Any, error: Exception) -> Response:
        return JSONResponse({}, 503)

    async def endpoint(_: StarletteRequest) -> Response:
        fail()
        return PlainTextResponse("ok")

    if switch == "inactive":
        stamina.set_active(False)
    try:
        with stamina.set_testing(switch == "testing", attempts=1):
            response = await post(make_app(endpoint, {ConflictError: answer}, attempts=5))
    finally:
        stamina.set_active(True)
    assert (response.status_code, response.json()) == (503, {})
    assert fail.calls == 1


@every_framework
@pytest.mark.parametrize(("attempts", "status"), [(1, 409), (2, 201)])
async def test_a_commit_that_fails_reaches_the_exception_handlers_after_the_last_attempt(
    database_url: URL, database: Database, make_app: Any, attempts: int, status: int
) -> None:
    commits = 0

    async def fail_first_commit(call: Call) -> Fault | None:
        nonlocal commits
        commits += call.statement.startswith("COMMIT")
        return Fault.ERROR if commits == 1 and call.statement.startswith("COMMIT") else None

    async def answer(_: Any, error: Exception) -> Response:
        return JSONResponse({}, 409)

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, fail_first_commit) as port:
        url = database_url.set(host="127.0.0.1", port=port)
        async with checked_connect(url, database) as connect:

            async def endpoint(_: StarletteRequest) -> Response:
                await add(connect, "a")
                return PlainTextResponse("ok", 201)

            response = await post(make_app(endpoint, {DBAPIError: answer}, attempts=attempts))
    assert response.status_code == status
    assert await database.names() == (["a"] if status == 201 else [])


async def test_an_attempt_leaves_no_objects_to_the_next(
    connect: DBConnect, database: Database
) -> None:
    sessions = []

    async def handler(_: Scope) -> int:
        session = await db_session(connect)
        sessions.append(session)
        session.add(Seat(number=len(sessions)))
        if len(sessions) < 3:
            raise ConflictError
        return 200

    await call(app_of(handler, attempts=3))
    assert len(set(sessions)) == 3
    assert await database.seats() == [3]


async def test_the_context_of_a_failed_attempt_has_ended(connect: DBConnect) -> None:
    sessions = []
    fail = Failing(1)

    async def handler(_: Scope) -> int:
        sessions.append(await add(connect, "a"))
        fail()
        return 200

    await call(app_of(handler, attempts=2))
    assert not is_context_initiated()
    for session in sessions:
        with pytest.raises(ContextClosedError):
            await session.execute(text("SELECT 1"))


@every_framework
async def test_the_answer_to_the_last_attempt_is_not_held_back(make_app: Any) -> None:
    fail, arrived = Failing(99), asyncio.Event()

    async def wait() -> None:
        async with asyncio.timeout(30):
            await arrived.wait()

    async def answer(_: Any, error: Exception) -> Response:
        # Sent to the client once, and not before the last attempt, its background task runs.
        return JSONResponse({}, 503, background=BackgroundTask(wait) if fail.calls == 3 else None)

    async def endpoint(_: StarletteRequest) -> Response:
        fail()
        return PlainTextResponse("ok")

    app = make_app(endpoint, {ConflictError: answer}, attempts=3)
    async with http_client(app, log_level="critical") as client:
        assert (await client.post("/a")).status_code == 503
        arrived.set()


async def test_an_error_after_an_answer_to_a_failed_commit_comes_out(connect: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=1)])
        try:
            await (await db_session(connect)).flush()
            await respond(send)
        except IntegrityError:
            await respond(send, 409)
        raise ValueError("after the answer")

    with pytest.raises(ValueError, match="after the answer"):
        await call(ASGIHTTPDBSessionMiddleware(app, attempts=3))


async def test_no_connection_is_held_between_two_attempts(connect: DBConnect) -> None:
    held: list[int] = []

    def hook(details: stamina.instrumentation.RetryDetails) -> None:
        assert (details.name, details.args) == ("ASGIHTTPDBSessionMiddleware", ())
        held.append(connections_out(connect))

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        raise ConflictError

    stamina.instrumentation.set_on_retry_hooks([hook])
    try:
        with pytest.raises(ConflictError):
            await call(app_of(handler, attempts=3))
    finally:
        stamina.instrumentation.set_on_retry_hooks(None)
    assert held == [0, 0]


async def test_a_request_inside_a_context_of_its_own_may_still_use_blocks(
    connect: DBConnect, database: Database
) -> None:
    fail = Failing(1)

    async def handler(_: Scope) -> int:
        async with atomic_db_session(connect, "append"):
            await add(connect, "a")
            async with atomic_db_session(connect, "savepoint"):
                await add(connect, "b")
            fail()
        async with new_db_session_ctx():
            await add(connect, "c")
        return 200

    await call(app_of(handler, attempts=2))
    assert await database.names() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attempts": 0}, ValueError, "attempts must be at least 1, not 0"),
        ({"attempts": -1}, ValueError, "attempts must be at least 1, not -1"),
        ({"attempts": "3"}, TypeError, "attempts must be an int, not str"),
        ({"attempts": None}, TypeError, "attempts must be an int, not NoneType"),
        ({"replay_body_limit": -1}, ValueError, "replay_body_limit must be at least 0, not -1"),
    ],
)
def test_bad_options_are_refused_at_once(
    options: Any, error: type[Exception], message: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    with pytest.raises(error, match=message):
        ASGIHTTPDBSessionMiddleware(app, **options)
