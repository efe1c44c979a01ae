"""An answer to an error is no success, whatever its status; one that an error is goes by it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import add, respond
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.failures import ConflictError, Failing
from tests.helpers.late_start import LATE
from tests.helpers.models import Item

Work = Callable[[], Awaitable[Any]]
Answer = Callable[..., Awaitable[Response]]
MakeApp = Callable[..., Any]


class RefusedError(Exception):
    """What an application raises, and answers with an envelope."""


async def envelope(_: Request, error: Exception) -> Response:
    return JSONResponse({"code": 4001, "message": type(error).__name__})


def sync_envelope(_: Request, __: Exception) -> Response:
    return JSONResponse({"code": 4001})


# An application that does some work, and answers the error that this raises.


def starlette(work: Work, answer: Any = envelope, error: Any = RefusedError, **options: Any) -> Any:
    async def endpoint(_: Request) -> Response:
        await work()
        return JSONResponse({}, 201)

    app = Starlette(routes=[Route("/", endpoint)], exception_handlers={error: answer})
    add_starlette_http_db_session_middleware(app, **options)
    return app


def fastapi(work: Work, answer: Any = envelope, error: Any = RefusedError, **options: Any) -> Any:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app, **options)
    app.add_exception_handler(error, answer)

    @app.get("/", status_code=201)
    async def endpoint() -> None:
        await work()

    return app


def fastapi_dependency(
    work: Work, answer: Any = envelope, error: Any = RefusedError, **options: Any
) -> Any:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app, **options)
    app.add_exception_handler(error, answer)

    @app.get("/", status_code=201, dependencies=[Depends(work)])
    async def endpoint() -> None:
        pass

    return app


def mounted(work: Work, answer: Any = envelope, error: Any = RefusedError, **options: Any) -> Any:
    async def endpoint(_: Request) -> Response:
        await work()
        return JSONResponse({}, 201)

    inner = Starlette(routes=[Route("/", endpoint)], exception_handlers={error: answer})
    app = Starlette(routes=[Mount("/", inner)])
    add_starlette_http_db_session_middleware(app, **options)
    return app


def behind_late_starts(*args: Any, **options: Any) -> Any:
    app = starlette(*args, **options)
    ours = app.user_middleware.pop(0)
    for middleware in LATE:
        app.add_middleware(middleware)
    app.user_middleware.insert(0, ours)
    return app


def pure_asgi(work: Work, answer: Any = envelope, error: Any = RefusedError, **options: Any) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await work()
        except error as raised:
            response = answer(Request(scope), raised)
            response = response if isinstance(response, Response) else await response
            await response(scope, receive, send)
        else:
            await respond(send, 201)

    return ASGIHTTPDBSessionMiddleware(app, **options)


def own_middleware(work: Work, *args: Any, **options: Any) -> Any:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await work()
        await respond(send, 201)

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        async def go_on() -> None:
            await app(scope, receive, send)

        await pure_asgi(go_on, *args).app(scope, receive, send)

    return ASGIHTTPDBSessionMiddleware(answering, **options)


def dispatching(
    work: Work, answer: Any = envelope, error: Any = RefusedError, **options: Any
) -> Any:
    async def endpoint(_: Request) -> Response:
        await work()
        return JSONResponse({}, 201)

    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        try:
            return await call_next(request)
        except error as raised:
            response = answer(request, raised)
            return response if isinstance(response, Response) else await response

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    add_starlette_http_db_session_middleware(app, **options)
    return app


WAYS = [
    starlette,
    fastapi,
    fastapi_dependency,
    mounted,
    behind_late_starts,
    pure_asgi,
    own_middleware,
    dispatching,
]
every_way = pytest.mark.parametrize("make", WAYS)
WITH_EXCEPTIONS_THAT_ANSWER = [starlette, fastapi, fastapi_dependency, behind_late_starts]


async def status_of(app: ASGIApp) -> int:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return (await client.get("/")).status_code


@every_way
@pytest.mark.parametrize("answer", [envelope, sync_envelope])
async def test_what_was_done_before_an_error_that_is_answered_with_200_is_rolled_back(
    connect: DBConnect, database: Database, make: MakeApp, answer: Any
) -> None:
    async def transfer() -> None:
        await add(connect, "the debit")
        raise RefusedError

    assert await status_of(make(transfer, answer)) == 200
    assert await database.names() == []
    assert connections_out(connect) == 0


@every_way
async def test_what_is_refused_by_the_database_and_answered_with_200_is_rolled_back(
    connect: DBConnect, database: Database, make: MakeApp
) -> None:
    async def add_twice() -> None:
        await add(connect, "a")
        await add(connect, "a")

    assert await status_of(make(add_twice, envelope, IntegrityError)) == 200
    assert await database.names() == []


@every_way
async def test_an_error_that_the_work_has_answered_itself_is_forgiven(
    connect: DBConnect, database: Database, make: MakeApp
) -> None:
    async def work() -> None:
        await add(connect, "a")
        with suppress(RefusedError):
            raise RefusedError

    assert await status_of(make(work)) == 201
    assert await database.names() == ["a"]


@every_way
async def test_what_the_handler_of_an_error_wants_to_keep_has_a_context_of_its_own(
    connect: DBConnect, database: Database, make: MakeApp
) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        await add(connect, "by the handler")
        await run_in_new_ctx(add, connect, "kept")
        return await envelope(request, error)

    async def work() -> None:
        await add(connect, "a")
        raise RefusedError

    assert await status_of(make(work, answer)) == 200
    assert await database.names() == ["kept"]


@every_way
@pytest.mark.parametrize("commits", [True, False])
async def test_commit_on_decides_alone(
    connect: DBConnect, database: Database, make: MakeApp, commits: bool
) -> None:
    asked: list[int] = []

    def commit_on(status: int) -> bool:
        asked.append(status)
        return commits

    async def work() -> None:
        await add(connect, "a")
        raise RefusedError

    assert await status_of(make(work, commit_on=commit_on)) == 200
    assert set(asked) == {200}
    assert await database.names() == (["a"] if commits else [])


class SeeOtherError(HTTPException):
    """An answer of an application's own class."""

    def __init__(self) -> None:
        super().__init__(303, headers={"location": "/other"})


@pytest.mark.parametrize("make", WITH_EXCEPTIONS_THAT_ANSWER)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SeeOtherError(), 303),
        (HTTPException(303), 303),
        (HTTPException(200), 200),
        (HTTPException(304), 304),
        (HTTPException(404), 404),
        (HTTPException(500), 500),
    ],
    ids=str,
)
async def test_an_exception_that_is_an_answer_goes_by_its_status(
    connect: DBConnect, database: Database, make: MakeApp, error: HTTPException, status: int
) -> None:
    async def work() -> None:
        await add(connect, "a")
        raise error

    assert await status_of(make(work)) == status
    assert await database.names() == (["a"] if status < 400 else [])


@pytest.mark.parametrize("make", WITH_EXCEPTIONS_THAT_ANSWER)
async def test_an_exception_that_is_an_answer_and_is_answered_otherwise_is_an_error(
    connect: DBConnect, database: Database, make: MakeApp
) -> None:
    async def work() -> None:
        await add(connect, "a")
        raise HTTPException(404)

    # As APIs do that answer everything with 200.
    assert await status_of(make(work, envelope, HTTPException)) == 200
    assert await database.names() == []


@pytest.mark.parametrize("make", WITH_EXCEPTIONS_THAT_ANSWER)
async def test_an_answer_that_was_raised_while_an_error_was_handled_goes_by_its_status(
    connect: DBConnect, database: Database, make: MakeApp
) -> None:
    async def work() -> None:
        await add(connect, "a")
        try:
            raise RefusedError
        except RefusedError as error:
            raise HTTPException(303) from error

    assert await status_of(make(work)) == 303
    assert await database.names() == ["a"]


async def test_a_request_that_is_not_valid_and_answered_with_200_is_rolled_back(
    connect: DBConnect, database: Database
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)
    app.add_exception_handler(RequestValidationError, envelope)

    async def dependency() -> None:
        await add(connect, "a")

    @app.get("/", dependencies=[Depends(dependency)])
    async def endpoint(number: int) -> None:
        pass

    assert await status_of(app) == 200
    assert await database.names() == []


@every_way
async def test_a_server_that_handles_an_error_itself_does_not_undo_a_request(
    connect: DBConnect, database: Database, make: MakeApp
) -> None:
    async def work() -> None:
        await add(connect, "a")

    try:
        raise RefusedError
    except RefusedError:
        assert await status_of(make(work)) == 201
    assert await database.names() == ["a"]


@pytest.mark.usefixtures("no_pauses")
@every_way
@pytest.mark.parametrize("failures", [2, 9])
async def test_an_error_that_is_answered_with_200_is_tried_again(
    connect: DBConnect, database: Database, make: MakeApp, failures: int
) -> None:
    fail = Failing(failures)

    async def work() -> None:
        await add(connect, "a")
        fail()

    status = await status_of(make(work, envelope, ConflictError, attempts=3))
    assert status == (201 if failures == 2 else 200)
    assert fail.calls == 3
    assert await database.names() == (["a"] if failures == 2 else [])


# The others would have to answer a failed commit outside of their `try`.
@pytest.mark.parametrize("make", [starlette, fastapi, fastapi_dependency, behind_late_starts])
async def test_a_commit_that_fails_and_is_answered_with_200_stores_nothing(
    connect: DBConnect, database: Database, make: MakeApp
) -> None:
    async def work() -> None:
        session = await db_session(connect)
        await session.execute(insert(Item).values(name="a"))

    fail = Failing(1, RefusedError)
    assert await status_of(make(work, before_commit=lambda _: fail())) == 200
    assert await database.names() == []
    assert connections_out(connect) == 0
