"""Requests with an idempotency key are done once, and answered alike."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import psycopg
import pytest
import pytest_asyncio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi import Depends, FastAPI
from sqlalchemy import URL, Connection, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from context_async_sqlalchemy import DBConnect, db_session, on_commit, roll_back_this_request
from context_async_sqlalchemy.asgi_types import ASGIApp, Message
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.idempotency import IdempotencyMiddleware, delete_expired_keys
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import add
from tests.helpers.cancelling import cancel_at
from tests.helpers.database import Database, assert_clean
from tests.helpers.failures import ConflictError, Failing
from tests.helpers.idempotency import (
    KEYS,
    is_replay,
    post,
    statuses,
    table_of_keys,
    user_of,
    with_keys,
)
from tests.helpers.models import Item
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client
from tests.helpers.store import Store


@pytest_asyncio.fixture
async def keyed(store: Store) -> AsyncGenerator[Store]:
    """Return a store that has a table of keys, too."""
    async with table_of_keys(store.outside):
        yield store


@pytest_asyncio.fixture
async def outside(database_url: URL, database: Database) -> AsyncGenerator[Outside]:
    """Return a view of the PostgreSQL database, which has a table of keys."""
    outside = Outside(database_url.render_as_string(hide_password=False))
    async with table_of_keys(outside):
        yield outside


def items(connect: DBConnect, *middleware: Middleware) -> Starlette:
    """Make an application whose answers differ each time it is called."""
    numbers = itertools.count(1)

    async def create(request: Request) -> Response:
        await add(connect, (await request.body()).decode())
        response = JSONResponse({"number": next(numbers)}, 201, {"x-header": "é"})
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    async def refuse(request: Request) -> Response:
        await add(connect, (await request.body()).decode())
        return JSONResponse({"number": next(numbers)}, 400)

    routes = [
        Route("/items", create, methods=["POST", "PUT"]),
        Route("/refused", refuse, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=middleware)


async def call_with_key(app: ASGIApp, number: int, sent: list[Message]) -> None:
    """Send a request without a server, with its number as the key and the body."""
    name = str(number).encode()
    scope = {"type": "http", "method": "POST", "path": "/items", "query_string": b""}

    async def receive() -> Message:
        return {"type": "http.request", "body": name}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({**scope, "headers": [(b"idempotency-key", name)]}, receive, send)


def is_replayed(start: Message) -> bool:
    return (b"idempotency-replayed", b"true") in start["headers"]


def of_application(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """Return the headers, without those that the server adds."""
    return [(n, v) for n, v in response.headers.raw if n.lower() not in (b"date", b"server")]


async def test_a_request_that_is_sent_again_is_done_once_and_answered_alike(keyed: Store) -> None:
    app = with_keys(items(keyed.connect), keyed.connect)
    async with http_client(app) as client:
        first = await post(client, "/items", body="a")
        again = await post(client, "/items", body="a")
    assert (first.status_code, first.json()) == (201, {"number": 1})
    assert not is_replay(first)
    assert len(first.headers.get_list("set-cookie")) == 2
    assert (again.status_code, again.content) == (201, first.content)
    assert of_application(again) == [*of_application(first), (b"idempotency-replayed", b"true")]
    assert await keyed.names() == ["a"]
    assert await statuses(keyed.outside) == [201]


async def test_fifty_equal_requests_at_once_are_one_row_and_fifty_equal_answers(
    database_url: URL, outside: Outside, database: Database
) -> None:
    async with DBConnect.from_url(database_url, pool_size=5, max_overflow=0) as connect:
        app = with_keys(items(connect), connect)
        async with http_client(app) as client:
            responses = await asyncio.gather(*(post(client, "/items", body="a") for _ in range(50)))
    assert {(r.status_code, r.content) for r in responses} == {(201, b'{"number":1}')}
    assert sum(map(is_replay, responses)) == 49
    assert await database.names() == ["a"]


async def test_another_request_with_the_same_key_is_refused(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    app = with_keys(items(connect), connect, methods=["POST", "PUT"])
    async with http_client(app) as client:
        await post(client, "/items", body="a")
        others = [
            await post(client, "/items", body="b"),
            await post(client, "/items?b", body="a"),
            await post(client, "/refused", body="a"),
            await client.put(
                "/items", content="a", headers={"idempotency-key": "1", "user": "ann"}
            ),
        ]
    assert [other.status_code for other in others] == [422] * 4
    assert "another request" in others[0].json()["detail"]
    assert await database.names() == ["a"]


async def test_a_key_belongs_to_its_caller(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    app = with_keys(items(connect), connect)
    async with http_client(app) as client:
        ann = await post(client, "/items", body="a", user="ann")
        bob = await post(client, "/items", body="b", user="bob")
    assert [ann.json(), bob.json()] == [{"number": 1}, {"number": 2}]
    assert await database.names() == ["a", "b"]


async def test_a_refusal_is_rolled_back_and_may_be_asked_again(keyed: Store) -> None:
    app = with_keys(items(keyed.connect), keyed.connect)
    async with http_client(app) as client:
        answers = [(await post(client, "/refused", body="a")).json() for _ in range(2)]
    assert answers == [{"number": 1}, {"number": 2}]
    assert await keyed.names() == []
    assert await statuses(keyed.outside) == []


async def test_what_the_middleware_commits_is_stored(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    app = with_keys(items(connect), connect, {"commit_on": lambda status: status <= 400})
    async with http_client(app) as client:
        answers = [await post(client, "/refused", body="a") for _ in range(2)]
    assert [(r.status_code, r.json()) for r in answers] == [(400, {"number": 1})] * 2
    assert await database.names() == ["a"]


async def test_a_key_costs_two_statements(connect: DBConnect, outside: Outside) -> None:
    sent: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        sent.append(statement.split(" ", 1)[0])

    app = with_keys(items(connect), connect)
    async with http_client(app) as client:
        await post(client, "/items", "1", body="a")
        assert connect.engine is not None
        event.listen(connect.engine.sync_engine, "before_cursor_execute", note)
        await post(client, "/items", "2", body="b")
        await post(client, "/items", "2", body="b")
    assert sent == ["WITH", "INSERT", "UPDATE", "WITH", "SELECT"]


async def test_after_a_handler_that_fails_the_same_key_works(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    fail = Failing(1)

    async def create(_: Request) -> Response:
        await add(connect, "a")
        fail()
        return Response("done")

    app = with_keys(Starlette(routes=[Route("/", create, methods=["POST"])]), connect)
    async with http_client(app) as client:
        assert (await post(client, "/")).status_code == 500
        assert await statuses(outside) == []
        assert (await post(client, "/")).text == "done"
        assert is_replay(await post(client, "/"))
    assert await database.names() == ["a"]


async def test_a_key_is_one_string_of_visible_characters(
    connect: DBConnect, outside: Outside
) -> None:
    app = with_keys(items(connect), connect, required=True)

    async def is_taken(*keys: str) -> bool:
        headers = [(b"idempotency-key", key.encode()) for key in keys]
        response = await client.post("/items", headers=headers)
        assert response.status_code in (201, 400)
        if response.status_code == 201:
            await delete_everything(outside)
        return response.status_code == 201

    async with http_client(app) as client:
        for key in "a" * 255, '"a b"', "a-b/c":
            assert await is_taken(key), key
        for key in "a" * 256, "", "a b", '"a', '"a"b', '""', "a\\", "é":
            assert not await is_taken(key), key
        assert not await is_taken()
        assert not await is_taken("a", "a")
        assert (await client.put("/items")).status_code == 201  # not one of the methods


async def delete_everything(outside: Outside) -> None:
    async with outside.connection() as connection:
        await connection.execute(text(f"TRUNCATE item, {KEYS.name}"))


async def test_quotes_make_no_other_key(connect: DBConnect, outside: Outside) -> None:
    async with http_client(with_keys(items(connect), connect)) as client:
        await post(client, "/items", "1")
        assert is_replay(await post(client, "/items", '"1"'))


async def test_a_request_without_a_key_is_as_it_was(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async with http_client(with_keys(items(connect), connect)) as client:
        await post(client, "/items", None, body="a")
        assert (await post(client, "/items", None, body="b")).json() == {"number": 2}
    assert await database.names() == ["a", "b"]
    assert await statuses(outside) == []


async def test_keys_that_expire_are_deleted_and_work_again(keyed: Store) -> None:
    for seconds in 0.000001, 60:
        app = with_keys(items(keyed.connect), keyed.connect, expires_after=seconds)
        async with http_client(app) as client:
            await post(client, "/items", str(seconds), body=str(seconds))
    assert await delete_expired_keys(keyed.connect, KEYS) == 1
    assert await delete_expired_keys(keyed.connect, KEYS) == 0
    async with http_client(app) as client:
        assert is_replay(await post(client, "/items", "60", body="60"))
        assert not is_replay(await post(client, "/items", "1e-06", body="another"))
    assert await keyed.names() == ["1e-06", "60", "another"]


async def test_a_key_that_is_deleted_meanwhile_is_to_be_sent_again(
    connect: DBConnect, outside: Outside, database_url: URL
) -> None:
    url = database_url.set(drivername="postgresql").render_as_string(hide_password=False)

    def delete_keys(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("WITH"):  # the key is there, and its answer is not read yet
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(f"DELETE FROM {KEYS.name}")

    app = with_keys(items(connect), connect)
    async with http_client(app) as client:
        await post(client, "/items", body="a")
        assert connect.engine is not None
        event.listen(connect.engine.sync_engine, "after_cursor_execute", delete_keys)
        response = await post(client, "/items", body="a")
    assert (response.status_code, response.headers["retry-after"]) == (409, "1")


async def test_alembic_generates_the_table(database_url: URL, database: Database) -> None:
    def compare(connection: Connection) -> list[Any]:
        def is_ours(_: object, name: str | None, kind: str, *__: object) -> bool:
            return kind != "table" or name == KEYS.name

        options = {"include_object": is_ours, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, KEYS.metadata))

    outside = Outside(database_url.render_as_string(hide_password=False))
    async with outside.connection() as connection:
        steps = await connection.run_sync(compare)
        assert [step[0] for step in steps] == ["add_table", "add_index"]
    async with table_of_keys(outside), outside.connection() as connection:
        assert await connection.run_sync(compare) == []


# While another request has the key


class Slow:
    """An application whose requests wait until they may go on."""

    def __init__(self, connect: DBConnect, status: int = 200) -> None:
        self.has_begun, self.may_go_on = asyncio.Event(), asyncio.Event()
        self.status, self.calls, self._connect = status, 0, connect
        self.app = Starlette(routes=[Route("/", self.create, methods=["POST"])])

    async def create(self, _: Request) -> Response:
        self.calls += 1
        number = self.calls
        await add(self._connect, str(number))
        self.has_begun.set()
        await self.may_go_on.wait()
        return Response(str(number), self.status if number == 1 else 200)


async def is_waiting(database: Database) -> bool:
    return bool(
        await database.fetch(
            "SELECT 1 FROM pg_stat_activity"
            " WHERE wait_event = 'transactionid' AND datname = current_database()"
        )
    )


@pytest.mark.parametrize(
    ("status", "expected"), [(200, [(200, "1"), (200, "1")]), (400, [(400, "1"), (200, "2")])]
)
async def test_a_duplicate_waits_for_the_first_and_takes_its_place_if_that_is_rolled_back(
    connect: DBConnect,
    outside: Outside,
    database: Database,
    status: int,
    expected: list[tuple[int, str]],
) -> None:
    slow = Slow(connect, status)
    async with http_client(with_keys(slow.app, connect)) as client:
        first = asyncio.create_task(post(client, "/"))
        await slow.has_begun.wait()
        second = asyncio.create_task(post(client, "/"))
        await until(lambda: is_waiting(database))
        slow.may_go_on.set()
        responses = [await first, await second]
    assert [(r.status_code, r.text) for r in responses] == expected
    assert await database.names() == [expected[1][1]]


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_duplicate_that_waits_for_too_long_is_told_to_come_again(
    keyed: Store, no_pauses: None, attempts: int
) -> None:
    connect = keyed.connect
    if keyed.driver == "aiosqlite":  # which has no time-out of a transaction
        connect = DBConnect.from_url(keyed.outside.url, connect_args={"timeout": 0.1})
    slow = Slow(connect)
    app = with_keys(slow.app, connect, {"attempts": attempts}, lock_timeout=0.1)
    async with http_client(app) as client:
        first = asyncio.create_task(post(client, "/"))
        await slow.has_begun.wait()
        second = await post(client, "/")
        slow.may_go_on.set()
        assert (await first).text == "1"
        assert is_replay(await post(client, "/"))
    assert (second.status_code, second.headers["retry-after"]) == (409, "1")
    assert await keyed.names() == ["1"]
    await connect.close()


async def test_the_time_out_is_not_that_of_the_statements_that_follow(
    connect: DBConnect, outside: Outside
) -> None:
    async def create(_: Request) -> Response:
        session = await db_session(connect)
        return Response(await session.scalar(text("SHOW lock_timeout")))

    async def set_timeout(_: Request) -> Response:
        session = await db_session(connect)
        await session.execute(text("SET lock_timeout = '7s'"))
        return Response()

    routes = [Route("/", create, methods=["POST"]), Route("/set", set_timeout)]
    async with http_client(with_keys(Starlette(routes=routes), connect)) as client:
        assert (await post(client, "/", "1")).text == "0"
        await client.get("/set")
        assert (await post(client, "/", "2")).text == "7s"


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize(("attempts", "status"), [(1, 409), (3, 200)])
async def test_at_a_stricter_isolation_level_attempts_find_the_answer(
    database_url: URL,
    outside: Outside,
    database: Database,
    no_pauses: None,
    level: Any,
    attempts: int,
    status: int,
) -> None:
    async with DBConnect.from_url(database_url, isolation_level=level) as connect:
        slow = Slow(connect)
        async with http_client(with_keys(slow.app, connect, {"attempts": attempts})) as client:
            first = asyncio.create_task(post(client, "/"))
            await slow.has_begun.wait()
            second = asyncio.create_task(post(client, "/"))
            await until(lambda: is_waiting(database))
            slow.may_go_on.set()
            assert (await first).text == "1"
            assert (await second).status_code == status
            assert is_replay(await post(client, "/"))
    assert await database.names() == ["1"]


async def test_each_attempt_claims_the_key_anew(keyed: Store, no_pauses: None) -> None:
    fail = Failing(2)

    async def create(request: Request) -> Response:
        await add(keyed.connect, (await request.body()).decode())
        fail()
        return Response("done")

    app = with_keys(
        Starlette(routes=[Route("/", create, methods=["POST"])]), keyed.connect, {"attempts": 3}
    )
    async with http_client(app) as client:
        assert (await post(client, "/", body="a")).text == "done"
        assert (await post(client, "/", body="a")).text == "done"
    assert fail.calls == 3
    assert await keyed.names() == ["a"]


# What is around it, and inside of it


class Tagging(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["x-tag"] = "1"
        return response


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("other", [Middleware(Tagging), Middleware(GZipMiddleware, minimum_size=1)])
async def test_other_middlewares_may_be_on_either_side(
    connect: DBConnect, outside: Outside, database: Database, other: Middleware, inside: bool
) -> None:
    keys = Middleware(IdempotencyMiddleware, connect=connect, table=KEYS, caller=user_of)
    # As written for Starlette: the first one is around the others.
    app = items(connect, *([keys, other] if inside else [other, keys]))
    add_starlette_http_db_session_middleware(app)
    async with http_client(app) as client:
        first, again = [await post(client, "/items", body="a") for _ in range(2)]
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert first.headers.get("x-tag") == again.headers.get("x-tag")
    assert first.headers.get("content-encoding") == again.headers.get("content-encoding")
    assert is_replay(again)
    assert await database.names() == ["a"]


async def test_it_may_be_that_of_a_mounted_application_alone(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    keys = Middleware(
        IdempotencyMiddleware, connect=connect, table=KEYS, caller=user_of, required=True
    )
    app = items(connect)
    app.routes.append(Mount("/keyed", items(connect), middleware=[keys]))
    add_starlette_http_db_session_middleware(app)
    async with http_client(app) as client:
        for expected in 400, 201, 201:
            key = None if expected == 400 else "1"
            assert (await post(client, "/keyed/items", key, body="a")).status_code == expected
        assert (await post(client, "/items", None, body="b")).status_code == 201
        assert (await post(client, "/items", "1", body="c")).status_code == 201
    assert await database.names() == ["a", "b", "c"]


async def test_it_goes_with_a_session_that_fastapi_injects(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    dependency = DBSessionDependency(connect)
    app = FastAPI()

    @app.post("/{name}", status_code=201)
    async def create(name: str, session: AsyncSession = Depends(dependency)) -> str:  # noqa: B008
        session.add(Item(name=name))
        return name

    app.add_middleware(IdempotencyMiddleware, connect=connect, table=KEYS, caller=user_of)
    add_fastapi_http_db_session_middleware(app)
    async with http_client(app) as client:
        assert [(await post(client, "/a")).status_code for _ in range(2)] == [201, 201]
    assert await database.names() == ["a"]


@pytest.mark.parametrize("status", [204, 303, 304])
async def test_a_response_without_a_body_is_stored(
    connect: DBConnect, outside: Outside, database: Database, status: int
) -> None:
    async def create(_: Request) -> Response:
        await add(connect, "a")
        return Response(status_code=status, headers={"location": "/a"})

    app = with_keys(Starlette(routes=[Route("/", create, methods=["POST"])]), connect)
    async with http_client(app) as client:
        for is_second in False, True:
            response = await post(client, "/")
            assert (response.status_code, response.headers["location"]) == (status, "/a")
            assert is_replay(response) is is_second
    assert await database.names() == ["a"]


async def test_what_runs_after_the_commit_runs_once(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    called: list[str] = []

    async def later() -> None:
        await add(connect, "later")

    async def create(_: Request) -> Response:
        await add(connect, "a")
        on_commit(connect, lambda: called.append("on_commit"))
        return Response("done", background=BackgroundTask(later))

    async def before_commit(_: Any) -> None:
        called.append("before_commit")

    app = Starlette(routes=[Route("/", create, methods=["POST"])])
    outer = {"before_commit": before_commit}
    async with http_client(with_keys(app, connect, outer)) as client:
        for _ in range(3):
            assert (await post(client, "/")).text == "done"
        await until(lambda: len(called) == 3)  # the second one of the background task
    assert called == ["before_commit", "on_commit", "before_commit"]
    assert await database.names() == ["a", "later"]


async def test_a_request_that_marks_itself_leaves_no_key(
    connect: DBConnect, outside: Outside, database: Database
) -> None:
    async def create(_: Request) -> Response:
        await add(connect, "a")
        roll_back_this_request()
        return PlainTextResponse("an error, says the body, of which nothing is to be stored")

    starlette = Starlette(routes=[Route("/", create, methods=["POST"])])
    app = with_keys(starlette, connect, body_limit=10)
    async with http_client(app) as client:
        assert [(await post(client, "/")).status_code for _ in range(2)] == [200, 200]
    assert await database.names() == []
    assert await statuses(outside) == []


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_a_request_that_is_cancelled_anywhere_leaves_a_key_only_with_its_work(
    connect: DBConnect, outside: Outside, database: Database, kind: str
) -> None:
    app = with_keys(items(connect), connect)
    for number in itertools.count(1):
        sent: list[Message] = []
        suspensions = await cancel_at(number, call_with_key(app, number, sent), kind)
        await assert_clean(connect, database)
        stored = [status for (status,) in await database.fetch(f"SELECT status FROM {KEYS.name}")]
        assert stored == [201] * len(await database.names())
        assert len(stored) == number or (len(stored) == number - 1 and not sent)
        again: list[Message] = []
        await call_with_key(app, number, again)
        assert is_replayed(again[0]) is (len(stored) == number)
        assert len(await database.names()) == number
        if suspensions < number:
            break
    assert number > 5


async def test_a_conflict_that_is_not_about_the_key_goes_to_the_application(
    connect: DBConnect, outside: Outside
) -> None:
    async def create(_: Request) -> Response:
        raise ConflictError

    async def handle(_: Request, __: Exception) -> Response:
        return Response("handled", 409)

    app = Starlette(
        routes=[Route("/", create, methods=["POST"])], exception_handlers={ConflictError: handle}
    )
    async with http_client(with_keys(app, connect)) as client:
        assert (await post(client, "/")).text == "handled"
