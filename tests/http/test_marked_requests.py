"""A request that is marked as failed is rolled back, whatever its status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.exc import IntegrityError
from starlette.middleware.base import BaseHTTPMiddleware

from context_async_sqlalchemy import (
    ContextNotInitiatedError,
    DBConnect,
    auto_commit_by_status_code,
    commit_after_response,
    commit_db_session,
    init_db_session_ctx,
    new_db_session_ctx,
    on_commit,
    reset_db_session_ctx,
    retry_on_transient_error,
    roll_back_this_request,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.test_utils import set_test_context
from tests.helpers.asgi import add, app_of, call
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.failures import Failing
from tests.helpers.programs import until
from tests.helpers.serving import http_client
from tests.helpers.store import Store


async def test_a_marked_request_is_rolled_back_and_answered_as_it_was(store: Store) -> None:
    called: list[str] = []

    async def handler(_: Scope) -> int:
        await add(store.connect, "a")
        on_commit(store.connect, lambda: called.append("a transaction was open"))
        roll_back_this_request()
        await add(store.connect, "b")
        return 200

    [start, _] = await call(app_of(handler))
    assert start["status"] == 200
    assert await store.names() == called == []


async def test_a_callback_without_a_transaction_is_dropped_too(store: Store) -> None:
    called: list[str] = []

    async def handler(_: Scope) -> int:
        on_commit(store.connect, lambda: called.append("no transaction was open"))
        roll_back_this_request()
        return 200

    await call(app_of(handler))
    assert called == []


async def test_the_mark_is_stronger_than_commit_on(store: Store) -> None:
    async def handler(_: Scope) -> int:
        await add(store.connect, "a")
        roll_back_this_request()
        return 404

    await call(app_of(handler, commit_on=lambda _: True))
    assert await store.names() == []


async def test_a_statement_that_has_failed_does_not_make_the_answer_a_500(store: Store) -> None:
    async def handler(_: Scope) -> int:
        await add(store.connect, "a")
        with suppress(IntegrityError):
            await add(store.connect, "a")
        roll_back_this_request()
        return 200

    [start, _] = await call(app_of(handler))
    assert start["status"] == 200
    assert await store.names() == []


async def test_what_was_committed_before_stays(store: Store) -> None:
    async def handler(_: Scope) -> int:
        await add(store.connect, "committed")
        await commit_db_session(store.connect)
        roll_back_this_request()
        await add(store.connect, "rolled back")
        return 200

    await call(app_of(handler))
    assert await store.names() == ["committed"]


@pytest.mark.parametrize("late", [False, True])
async def test_a_body_and_a_background_task_are_rolled_back_with_a_marked_request(
    store: Store, late: bool
) -> None:
    app, ended = FastAPI(), asyncio.Event()
    add_fastapi_http_db_session_middleware(app)

    async def body() -> AsyncGenerator[str]:
        await add(store.connect, "body")
        yield "the whole body"

    async def task() -> None:
        await add(store.connect, "task")
        ended.set()

    @app.get("/")
    async def stream(tasks: BackgroundTasks) -> StreamingResponse:
        if late:
            commit_after_response()
        await add(store.connect, "handler")
        roll_back_this_request()
        tasks.add_task(task)
        return StreamingResponse(body(), background=tasks)

    async with http_client(app) as client:
        response = await client.get("/")
        assert (response.status_code, response.text) == (200, "the whole body")
        await ended.wait()
        await until(lambda: connections_out(store.connect) == 0)
    assert await store.names() == []


async def test_a_body_that_marks_the_request_undoes_only_itself(store: Store) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    async def body() -> AsyncGenerator[str]:
        await add(store.connect, "body")
        roll_back_this_request()
        yield "the whole body"

    @app.get("/")
    async def stream() -> StreamingResponse:
        await add(store.connect, "handler")
        return StreamingResponse(body())

    async with http_client(app) as client:
        assert (await client.get("/")).text == "the whole body"
    assert await store.names() == ["handler"]


async def test_a_unit_of_work_inside_a_marked_request_is_its_own(store: Store) -> None:
    async def in_a_call() -> None:
        await add(store.connect, "a call")

    async def handler(_: Scope) -> int:
        roll_back_this_request()
        async with new_db_session_ctx():
            await add(store.connect, "a block")
        await run_in_new_ctx(in_a_call)
        await add(store.connect, "the request")
        return 200

    await call(app_of(handler))
    assert await store.names() == ["a block", "a call"]


async def test_a_block_that_is_marked_leaves_its_request_alone(store: Store) -> None:
    async def handler(_: Scope) -> int:
        async with new_db_session_ctx():
            await add(store.connect, "a block")
            roll_back_this_request()
        await add(store.connect, "the request")
        return 200

    await call(app_of(handler))
    assert await store.names() == ["the request"]


@pytest.mark.usefixtures("no_pauses")
async def test_each_attempt_begins_unmarked(connect: DBConnect, database: Database) -> None:
    fail = Failing(1)

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        if fail.calls == 0:
            roll_back_this_request()
        fail()
        return 200

    await call(app_of(handler, attempts=3))
    assert await database.names() == ["a"]
    assert fail.calls == 2


@pytest.mark.usefixtures("no_pauses")
async def test_a_function_that_is_repeated_may_mark_its_last_attempt(
    connect: DBConnect, database: Database
) -> None:
    @retry_on_transient_error()
    async def work() -> str:
        await add(connect, "a")
        roll_back_this_request()
        return "done"

    assert await work() == "done"
    assert await database.names() == []


async def test_a_dispatch_function_and_a_dependency_take_notice(store: Store) -> None:
    with_dispatch, with_dependency = FastAPI(), FastAPI()
    with_dispatch.add_middleware(BaseHTTPMiddleware, dispatch=fastapi_http_db_session_middleware)
    dependency = DBSessionDependency(store.connect)

    @with_dispatch.get("/")
    async def use_the_context() -> None:
        await add(store.connect, "a")
        roll_back_this_request()

    @with_dependency.get("/", dependencies=[Depends(dependency)])
    async def use_what_is_injected() -> None:
        await add(store.connect, "b")
        roll_back_this_request()

    for app in with_dispatch, with_dependency:
        async with http_client(app) as client:
            assert (await client.get("/")).status_code == 200
    assert await store.names() == []


async def test_a_sync_endpoint_may_mark_its_request(store: Store) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    async def write() -> None:
        await add(store.connect, "a")

    @app.get("/", dependencies=[Depends(write)])
    def in_a_thread() -> None:
        roll_back_this_request()

    async with http_client(app) as client:
        assert (await client.get("/")).status_code == 200
    assert await store.names() == []


async def test_a_context_that_is_settled_by_hand_takes_notice(store: Store) -> None:
    token = init_db_session_ctx()
    await add(store.connect, "a")
    roll_back_this_request()
    await auto_commit_by_status_code(200)
    await reset_db_session_ctx(token)
    assert await store.names() == []


async def test_a_tests_own_context_takes_no_notice_as_of_a_status(
    connect: DBConnect, database: Database
) -> None:
    async def handler(scope: Scope) -> int:
        await add(connect, scope["path"])
        roll_back_this_request()
        return 404

    async with set_test_context(auto_close=True):
        await call(app_of(handler))
    assert await database.names() == ["/"]


async def test_without_a_context_there_is_nothing_to_mark() -> None:
    with pytest.raises(ContextNotInitiatedError):
        roll_back_this_request()


async def test_an_envelope_that_tells_of_an_error_stores_nothing(store: Store) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.get("/")
    async def debit_without_credit() -> JSONResponse:
        await add(store.connect, "a debit")
        try:
            raise ValueError("no such account")
        except ValueError as error:
            roll_back_this_request()
            answer = {"error": str(error)}
        return JSONResponse(answer)

    async with http_client(app) as client:
        assert (await client.get("/")).json() == {"error": "no such account"}
    assert await store.names() == []
