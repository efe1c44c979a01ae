"""Work that a response or a failure after it undoes is told of, in the log."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import delete, event, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from starlette.middleware.base import BaseHTTPMiddleware

from context_async_sqlalchemy import (
    DBConnect,
    auto_commit_by_status_code,
    commit_after_response,
    db_session,
    init_db_session_ctx,
    new_db_session_ctx,
    reset_db_session_ctx,
    roll_back_this_request,
)
from context_async_sqlalchemy._engine.written import _count
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from tests.helpers.asgi import add, app_of, call, http_scope
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.programs import until
from tests.helpers.serving import http_client
from tests.helpers.store import Store

LOGGER = "context_async_sqlalchemy"
TOLD = "The response {} rolls back what its request has written (GET '/secret\\n'): rows: {}, "
UNFLUSHED = "objects that were not flushed: {}"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Let the logger log at INFO; return a function that returns its messages until now."""
    caplog.set_level(logging.INFO, LOGGER)

    def told() -> list[str]:
        messages = [r.getMessage() for r in caplog.records if r.name == LOGGER]
        caplog.clear()
        return messages

    return told


async def answer(store: Store, work: Any, status: int = 409, **options: Any) -> None:
    async def handler(_: Scope) -> int:
        await work(await db_session(store.connect))
        return status

    await call(app_of(handler, **options), http_scope("/secret\n"))


async def write(session: Any) -> None:
    session.add_all([Item(name="a"), Item(name="b"), Item(name="c")])
    await session.flush()
    await session.execute(insert(Item), [{"name": "d"}, {"name": "e"}])
    await session.execute(text("INSERT INTO item (name) VALUES ('f')"))
    item = (await session.scalars(select(Item).where(Item.name == "a"))).one()
    item.name = "g"
    await session.flush()
    await session.execute(update(Item).values(name=Item.name + "!"))
    await session.execute(delete(Item).where(Item.name == "f!"))


async def test_a_response_that_rolls_back_says_how_many_rows(
    store: Store, told: Callable[[], list[str]]
) -> None:
    await answer(store, write)
    # Three, two and one are inserted, one is updated, then all six, and one is deleted.
    assert told() == [TOLD.format(409, 3 + 2 + 1 + 1 + 6 + 1) + UNFLUSHED.format(0)]
    await answer(store, write, 200)
    assert told() == []


async def test_objects_that_were_not_flushed_are_told_of(
    store: Store, told: Callable[[], list[str]]
) -> None:
    await answer(store, write, 200)

    async def work(session: Any) -> None:
        one, two, same = (await session.scalars(select(Item).order_by(Item.id).limit(3))).all()
        one.name = "changed"
        await session.delete(two)
        same.name = str(same.name)
        session.add_all([Item(name="x"), Item(name="y")])

    await answer(store, work)
    assert told() == [TOLD.format(409, 0) + UNFLUSHED.format(4)]


async def test_a_request_that_has_only_read_is_not_told_of(
    store: Store, told: Callable[[], list[str]]
) -> None:
    async def work(session: Any) -> None:
        (await session.scalars(select(Item))).all()
        (await session.execute(text("SELECT * FROM item"))).all()
        async with session.begin_nested():
            await session.execute(update(Item).where(Item.name == "nobody").values(name="x"))

    await answer(store, work, 404)
    assert told() == []


async def test_what_was_written_before_a_statement_failed_is_told_of(
    store: Store, told: Callable[[], list[str]]
) -> None:
    async def work(session: Any) -> None:
        session.add(Item(name="a"))
        await session.flush()
        with suppress(IntegrityError):
            await session.execute(insert(Item).values(name="a"))

    async def work_that_fails_to_flush(session: Any) -> None:
        session.add(Item(name="a"))
        await session.flush()
        session.add(Item(name="a"))
        with suppress(IntegrityError):
            await session.flush()

    for each in work, work_that_fails_to_flush:
        await answer(store, each)
        assert told() == [TOLD.format(409, 1) + UNFLUSHED.format(0)]


async def test_what_was_committed_before_is_not_counted(
    store: Store, told: Callable[[], list[str]]
) -> None:
    async def work(session: Any) -> None:
        await session.execute(insert(Item).values(name="committed"))
        await session.commit()
        await session.execute(insert(Item).values(name="lost"))

    await answer(store, work)
    assert told() == [TOLD.format(409, 1) + UNFLUSHED.format(0)]
    assert await store.names() == ["committed"]


async def test_in_autocommit_nothing_is_lost(store: Store, told: Callable[[], list[str]]) -> None:
    async def work(session: Any) -> None:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await session.execute(insert(Item).values(name="a"))

    await answer(store, work)
    assert told() == []
    assert await store.names() == ["a"]


async def test_nothing_is_counted_or_told_when_nobody_reads_of_it(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, LOGGER)
    counted = []

    async def work(session: Any) -> None:
        await write(session)
        engine = store.connect.engine
        assert engine is not None
        counted.append(event.contains(engine.sync_engine, "after_cursor_execute", _count))

    await answer(store, work)
    assert counted == [False]
    assert caplog.text == ""


async def test_an_engine_that_is_there_already_is_counted_once_the_level_is_set(
    connect: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        return 400

    await call(app_of(handler))
    caplog.set_level(logging.INFO, LOGGER)
    for _ in range(2):
        await call(app_of(handler))
    assert caplog.text.count("rows: 1,") == 2


@pytest.mark.parametrize("late", [False, True])
async def test_a_marked_request_is_told_of_with_its_status(
    store: Store, told: Callable[[], list[str]], late: bool
) -> None:
    async def work(_: Any) -> None:
        await add(store.connect, "a")
        roll_back_this_request()
        if late:
            commit_after_response()

    await answer(store, work, 200)
    assert told() == [TOLD.format(200, 1) + UNFLUSHED.format(0)]


async def test_an_exception_is_not_told_of_and_its_answer_is(
    connect: DBConnect, told: Callable[[], list[str]]
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.get("/{kind}")
    async def stumble(kind: str) -> None:
        await add(connect, "a")
        raise HTTPException(403) if kind == "refused" else ValueError

    async with http_client(app, log_level="critical") as client:
        assert (await client.get("/broken?token=1")).status_code == 500
        assert told() == []
        assert (await client.get("/refused?token=1")).status_code == 403
    [message] = told()
    assert "response 403" in message
    assert "(GET '/refused')" in message


async def test_every_way_to_settle_by_a_status_tells(
    store: Store, told: Callable[[], list[str]]
) -> None:
    with_dispatch, with_dependency = FastAPI(), FastAPI()
    with_dispatch.add_middleware(BaseHTTPMiddleware, dispatch=fastapi_http_db_session_middleware)
    dependency = DBSessionDependency(store.connect)

    @with_dispatch.get("/", status_code=400)
    @with_dependency.get("/", status_code=400, dependencies=[Depends(dependency)])
    async def endpoint() -> None:
        await add(store.connect, "a")

    for app in with_dispatch, with_dependency:
        async with http_client(app) as client:
            assert (await client.get("/")).status_code == 400
        [message] = told()
        assert "(GET '/'): rows: 1," in message
    token = init_db_session_ctx()
    await add(store.connect, "a")
    await auto_commit_by_status_code(400)
    await reset_db_session_ctx(token)
    [message] = told()
    assert "(outside of a request): rows: 1," in message


# After the response


def application(connect: DBConnect) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    async def write(name: str) -> None:
        await add(connect, name)

    async def stumble() -> None:
        raise ValueError("too late")

    @app.get("/tasks/{name}")
    async def schedule(name: str, tasks: BackgroundTasks) -> None:
        if name:
            await add(connect, "handler")
        if name == "writes":
            tasks.add_task(write, "first task")
        tasks.add_task(stumble)

    @app.get("/body")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            await add(connect, "body")
            yield "a part"
            raise ValueError("no more parts")

        return StreamingResponse(body())

    return app


async def test_a_background_task_that_undoes_an_earlier_one_is_told_of(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    async with http_client(application(store.connect), log_level="critical") as client:
        assert (await client.get("/tasks/writes?token=1")).status_code == 200
        await until(lambda: "rolled back" in caplog.text)
    [record] = [r for r in caplog.records if r.name == LOGGER]
    assert record.levelno == logging.WARNING
    assert "after its response had started (GET '/tasks/writes')" in record.getMessage()
    assert await store.names() == ["handler"]


async def test_a_background_task_that_undoes_nothing_is_not_told_of(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with http_client(application(connect), log_level="critical") as client:
        assert (await client.get("/tasks/reads")).status_code == 200
    assert [r for r in caplog.records if r.name == LOGGER] == []
    assert await database.names() == ["handler"]


async def test_a_streamed_body_that_raises_is_told_of(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    async with http_client(application(store.connect), log_level="critical") as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/body")
    [record] = [r for r in caplog.records if r.name == LOGGER]
    assert record.levelno == logging.WARNING
    assert "(GET '/body')" in record.getMessage()
    assert await store.names() == []


async def test_a_failure_before_the_response_is_not_told_of(
    connect: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_: Scope) -> int:
        await add(connect, "a")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        await call(app_of(handler))
    with pytest.raises(ValueError):  # noqa: PT011
        async with new_db_session_ctx():
            await add(connect, "a")
            raise ValueError
    assert caplog.text == ""
