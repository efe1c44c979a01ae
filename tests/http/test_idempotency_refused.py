"""What does not go with an idempotency key is refused, and nothing of it is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import URL, text, update
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_after_response,
    commit_db_session,
    db_session,
    rollback_db_session,
)
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from context_async_sqlalchemy.idempotency import IdempotencyMiddleware
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from context_async_sqlalchemy.test_utils import set_test_context, shared_transaction
from tests.helpers.asgi import add
from tests.helpers.database import Database, checked_connect
from tests.helpers.idempotency import (
    KEYS,
    is_replay,
    post,
    statuses,
    table_of_keys,
    user_of,
    with_keys,
)
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client

Handler = Callable[[Request], Awaitable[Response]]


@pytest_asyncio.fixture
async def outside(database_url: URL, database: Database) -> AsyncGenerator[Outside]:
    """Return a view of the database, which has a table of keys."""
    outside = Outside(database_url.render_as_string(hide_password=False))
    async with table_of_keys(outside):
        yield outside


def serving(handler: Handler, **options: Any) -> Starlette:
    return Starlette(routes=[Route("/", handler, methods=["POST"])], **options)


async def raised_by(app: Any, **headers: str) -> BaseException:
    """Send a request with a key without a server; return what comes out of the application."""
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}

    messages = [{"type": "http.request", "body": b""}]

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: Any) -> None:
        assert message.get("status", 500) == 500

    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    with pytest.raises(Exception) as raised:  # noqa: PT011  # the tests look what it says
        await app({**scope, "headers": [(b"idempotency-key", b"1"), *given]}, receive, send)
    return raised.value


class PassingOn(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response


def handlers(connect: DBConnect, tmp_path: Path) -> dict[str, tuple[Handler, str]]:
    """Return what does not go with a key, and what the error says."""

    async def stream(_: Request) -> Response:
        async def body() -> AsyncGenerator[str]:
            yield "a"

        await add(connect, "a")
        return StreamingResponse(body())

    async def send_file(_: Request) -> Response:
        await add(connect, "a")
        (tmp_path / "file").write_bytes(b"a" * 1001)
        return FileResponse(tmp_path / "file")

    async def answer_at_length(_: Request) -> Response:
        await add(connect, "a")
        return Response("a" * 1001)

    async def commit(_: Request) -> Response:
        await add(connect, "a")
        await commit_db_session(connect)
        return Response()

    async def commit_by_the_session(_: Request) -> Response:
        await (await add(connect, "a")).commit()
        return Response()

    async def commit_a_savepoint_and_all(_: Request) -> Response:
        session = await add(connect, "a")
        await session.begin_nested()
        await commit_db_session(connect)
        return Response()

    async def commit_other_work(_: Request) -> Response:
        await rollback_db_session(connect)
        return await commit(_)

    async def commit_by_a_block(_: Request) -> Response:
        await add(connect, "a")
        async with atomic_db_session(connect):
            return Response()

    async def commit_late(_: Request) -> Response:
        await add(connect, "a")
        commit_after_response()
        return Response()

    async def roll_back(_: Request) -> Response:
        await rollback_db_session(connect)
        await add(connect, "a")
        return Response()

    async def close(_: Request) -> Response:
        await close_db_session(connect)
        await add(connect, "a")
        return Response()

    return {
        "a streamed response": (stream, "streamed"),
        "a file": (send_file, "larger than body_limit, which is 1000 bytes"),
        "a large response": (answer_at_length, "larger than body_limit"),
        "an early commit": (commit, "commit_db_session"),
        "a commit of the session": (commit_by_the_session, "commits it before"),
        "a commit in a savepoint": (commit_a_savepoint_and_all, "commits it before"),
        "a commit after a rollback": (commit_other_work, "commits it before"),
        "a block": (commit_by_a_block, "atomic_db_session"),
        "commit_after_response": (commit_late, "commit_after_response"),
        "a rollback": (roll_back, "rollback_db_session"),
        "a session that was closed": (close, "ended the transaction"),
    }


@pytest.mark.parametrize(
    ("what", "inside"),
    [
        *((what, None) for what in handlers(DBConnect.from_url("sqlite://"), Path())),
        *((what, PassingOn) for what in ("a streamed response", "a file", "an early commit")),
    ],
)
async def test_what_does_not_go_with_a_key_is_refused_and_not_stored(
    connect: DBConnect,
    outside: Outside,
    database: Database,
    tmp_path: Path,
    what: str,
    inside: Any,
) -> None:
    handler, message = handlers(connect, tmp_path)[what]
    app = serving(handler)
    if inside is not None:
        app.add_middleware(inside)
    keyed = with_keys(app, connect, body_limit=1000)
    error = await raised_by(keyed)
    assert isinstance(error, RuntimeError)
    assert message in str(error)
    assert await database.names() == []
    assert await statuses(outside) == []
    async with http_client(keyed) as client:
        assert (await post(client, "/")).status_code == 500


async def test_a_refusal_reaches_the_exception_handlers(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def answer(_: Request) -> Response:
        await add(connect, "a")
        return Response("a" * 1001)

    async def handle(_: Request, error: Exception) -> Response:
        return Response(f"handled: {error}")  # a success, which commits

    app = serving(answer, exception_handlers={RuntimeError: handle})
    app.add_middleware(
        IdempotencyMiddleware, connect=connect, table=KEYS, caller=user_of, body_limit=1000
    )
    add_starlette_http_db_session_middleware(app)
    async with http_client(app) as client:
        response = await post(client, "/")
    assert response.text.startswith("handled: The answer")
    assert await database.names() == []
    assert await statuses(outside) == []


async def test_a_second_database_is_refused_unless_it_is_only_read(
    connect: DBConnect, second_connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def read(request: Request) -> Response:
        await add(connect, "a")
        read_only = request.headers.get("read-only") == "1" or None
        session = await db_session(second_connect, read_only=read_only)
        await session.execute(text("SELECT 1"))
        return Response()

    app = with_keys(serving(read), connect)
    error = await raised_by(app)
    assert "several databases" in str(error)
    assert await database.names() == []
    async with http_client(app) as client:
        headers = {"idempotency-key": "1", "read-only": "1"}
        assert (await client.post("/", headers=headers)).status_code == 200
    assert await statuses(outside) == [200]


async def test_what_a_background_task_writes_after_a_refusal_is_committed(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def refuse(_: Request) -> Response:
        await add(connect, "a")
        return Response(status_code=400, background=BackgroundTask(add, connect, "later"))

    async with http_client(with_keys(serving(refuse), connect)) as client:
        assert (await post(client, "/")).status_code == 400
        await until(database.names)
    assert await database.names() == ["later"]
    assert await statuses(outside) == []


async def test_a_savepoint_goes_with_a_key(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def create(_: Request) -> Response:
        async with atomic_db_session(connect, "savepoint"):
            await add(connect, "a")
        return Response()

    async with http_client(with_keys(serving(create), connect)) as client:
        assert [(await post(client, "/")).status_code for _ in range(2)] == [200, 200]
    assert await database.names() == ["a"]


async def test_a_key_that_was_stored_without_an_answer_is_not_replayed(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def create(_: Request) -> Response:
        await add(connect, "a")
        return Response()

    app = with_keys(serving(create), connect)
    async with http_client(app) as client:
        await post(client, "/", user="")
    async with outside.connection() as connection:
        await connection.execute(update(KEYS).values(status=None))
    assert "without an answer" in str(await raised_by(app))
    assert await database.names() == ["a"]


async def test_a_session_that_only_reads_or_has_no_transaction_is_refused(
    connect: DBConnect, outside: Outside, database_url: URL, database: Database
) -> None:
    async def create(_: Request) -> Response:
        raise AssertionError("called")

    app = with_keys(serving(create), connect, {"read_only_methods": {"POST"}})
    assert "read-only" in str(await raised_by(app))
    async with checked_connect(database_url, database, isolation_level="AUTOCOMMIT") as other:
        assert "AUTOCOMMIT" in str(await raised_by(with_keys(serving(create), other)))
    assert await statuses(outside) == []


async def test_a_streamed_response_is_refused_behind_a_middleware_into_which_nobody_sees(
    connect: DBConnect, outside: Outside, database: Database, tmp_path: Path
) -> None:
    stream, _ = handlers(connect, tmp_path)["a streamed response"]
    keyed = IdempotencyMiddleware(serving(stream), connect, KEYS, caller=user_of)

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await keyed(scope, receive, send)

    assert "is streamed" in str(await raised_by(ASGIHTTPDBSessionMiddleware(around)))
    assert await database.names() == []


@pytest.mark.parametrize("extension", ["pathsend", "zerocopysend"])
async def test_a_file_that_the_server_would_send_is_refused(
    connect: DBConnect, outside: Outside, database: Database, extension: str
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await add(connect, "a")
        headers = [(b"content-length", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": f"http.response.{extension}", "path": "/a", "file": 0})

    assert "sent as a file" in str(await raised_by(with_keys(app, connect)))
    assert await database.names() == []


async def test_an_application_that_thinks_better_of_its_answer_stores_none(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await add(connect, "a")
        for status in 200, 500:
            headers = [(b"content-length", b"1")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"a"})

    async with http_client(with_keys(app, connect)) as client:
        response = await post(client, "/")
    assert (response.status_code, response.text) == (500, "a")
    assert await database.names() == []
    assert await statuses(outside) == []


async def test_a_message_that_is_no_body_is_passed_on(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await add(connect, "a")
        headers = [(b"content-length", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.debug", "info": {}})
        for part, more in (b"", True), (b"a", False):
            await send({"type": "http.response.body", "body": part, "more_body": more})

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
    headers = [(b"idempotency-key", b"1")]
    await with_keys(app, connect)({**scope, "headers": headers}, receive, send)
    start, body = "http.response.start", "http.response.body"
    assert sent == ["http.response.debug", start, body]
    assert await database.names() == ["a"]


async def test_a_body_that_is_too_large_is_refused(connect: DBConnect, outside: Outside) -> None:
    async def create(request: Request) -> Response:
        return Response(str(len(await request.body())))

    async with http_client(with_keys(serving(create), connect, body_limit=1000)) as client:
        assert (await post(client, "/", body="a" * 1000)).text == "1000"
        assert (await post(client, "/", "2", body="a" * 1001)).status_code == 413


async def test_a_client_that_leaves_in_its_body_calls_nothing(connect: DBConnect) -> None:
    messages = [{"type": "http.request", "body": b"a", "more_body": True}]

    async def receive() -> Any:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise AssertionError("sent")

    async def app(_: Scope, __: Receive, ___: Send) -> None:
        raise AssertionError("called")

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
    headers = [(b"idempotency-key", b"1")]
    await with_keys(app, connect)({**scope, "headers": headers}, receive, send)
    assert connect.engine is None


async def test_the_wrong_order_is_told(connect: DBConnect) -> None:
    async def create(_: Request) -> Response:
        raise AssertionError("called")

    inner = ASGIHTTPDBSessionMiddleware(serving(create))
    app = IdempotencyMiddleware(inner, connect, KEYS, caller=user_of)
    assert "is not inside of" in str(await raised_by(app))


async def test_in_a_shared_transaction_a_key_does_what_it_does(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def create(_: Request) -> Response:
        await add(connect, "a")
        return Response("done")

    app = with_keys(serving(create), connect)
    async with shared_transaction(connect), http_client(app) as client:
        assert (await post(client, "/")).text == "done"
        assert is_replay(await post(client, "/"))
    assert await statuses(outside) == []
    assert await database.names() == []


async def test_in_the_context_of_a_test_a_key_does_nothing(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def create(_: Request) -> Response:
        return Response("done")

    app = with_keys(serving(create), connect)
    async with (
        set_test_context(auto_close=True),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        assert not is_replay(await post(client, "/"))
        assert not is_replay(await post(client, "/"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"caller": "ann"}, TypeError),
        ({"methods": "POST"}, TypeError),
        ({"expires_after": 0}, ValueError),
        ({"lock_timeout": 0}, ValueError),
        ({"body_limit": -1}, ValueError),
    ],
)
def test_a_bad_option_is_refused_at_once(options: Any, error: type[Exception]) -> None:
    async def app(_: Scope, __: Receive, ___: Send) -> None: ...

    with pytest.raises(error, match=next(iter(options))):
        with_keys(app, DBConnect.from_url("sqlite://"), **options)


async def test_a_caller_is_a_function_that_returns_a_string(connect: DBConnect) -> None:
    async def create(_: Request) -> Response:
        raise AssertionError("called")

    async def user(_: Scope) -> str:
        return "ann"

    with pytest.raises(TypeError, match="caller"):
        with_keys(serving(create), connect, caller=user)
    error = await raised_by(with_keys(serving(create), connect, caller=lambda _: None))
    assert "caller must return a str, not NoneType" in str(error)
