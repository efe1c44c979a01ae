"""Requests that the middleware gives to the application again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import psutil
import pytest
import stamina
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy import URL, insert, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request as StarletteRequest
from starlette.routing import Mount, Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    CommitOutcomeUnknownError,
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
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.conftest import Database, checked_connect, make_connect
from tests.faults.test_faults import cancel_at
from tests.helpers.connections import connections_out
from tests.helpers.models import Item, Seat
from tests.helpers.postgres import free_port
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.serving import http_client, serve
from tests.http.test_asgi_utils import add, app_of, call, http_scope, respond
from tests.unit.test_retry import ConflictError, Failing

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def no_pauses() -> Generator[None]:
    with stamina.set_testing(True, attempts=3):
        yield


def starlette_app(endpoint: Any, handlers: dict[Any, Any], **options: Any) -> Starlette:
    inner = Starlette(routes=[Route("/{name}", endpoint, methods=["POST"])])
    app = Starlette(
        routes=[Route("/{name}", endpoint, methods=["POST"]), Mount("/mounted", inner)],
        exception_handlers=handlers,
    )
    add_starlette_http_db_session_middleware(app, **options)
    return app


def fastapi_app(endpoint: Any, handlers: dict[Any, Any], **options: Any) -> FastAPI:
    app = FastAPI(exception_handlers=handlers)

    async def fastapi_endpoint(request: Request) -> Response:
        response: Response = await endpoint(request)
        return response

    app.add_api_route("/{name}", fastapi_endpoint, methods=["POST"])
    add_fastapi_http_db_session_middleware(app, **options)
    return app


every_framework = pytest.mark.parametrize("make_app", [starlette_app, fastapi_app])


async def post(app: Any, path: str = "/a", content: bytes = b"") -> httpx.Response:
    async with http_client(app, log_level="critical") as client:
        return await client.post(path, content=content)


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


async def test_another_error_is_not_tried_again(connect: DBConnect) -> None:
    fail = Failing(1, ValueError)

    async def handler(_: Scope) -> int:
        fail()
        return 200

    with pytest.raises(ValueError):  # noqa: PT011
        await call(app_of(handler, attempts=3))
    assert fail.calls == 1


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
        async with asyncio.timeout(10):
            while not await no_connection_to(port):
                await asyncio.sleep(0.001)
        left.set()
        async with asyncio.timeout(10):
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
                if key != "context_async_sqlalchemy"
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


async def test_a_mounted_application_is_found_again(connect: DBConnect) -> None:
    fail = Failing(2)

    async def endpoint(request: StarletteRequest) -> Response:
        fail()
        return PlainTextResponse(request.url.path)

    response = await post(starlette_app(endpoint, {}, attempts=3), "/mounted/a")
    assert (response.status_code, response.text) == (200, "/mounted/a")


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
        async with asyncio.timeout(10):
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
