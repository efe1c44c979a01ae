"""A middleware inside ours starts a response late: its body has one transaction all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from starlette import __version__ as starlette_version
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    commit_after_response,
    db_session,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.starlette_utils import (
    StarletteHTTPDBSessionMiddleware,
    add_starlette_http_db_session_middleware,
    starlette_http_db_session_middleware,
)
from tests.helpers.asgi import add, http_scope
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.failures import Failing
from tests.helpers.late_start import LATE, Holding, Spawning
from tests.helpers.models import Seat
from tests.helpers.serving import http_client

Endpoint = Callable[[Request], Awaitable[Response]]
MakeApp = Callable[..., Any]
ROWS = 2000
STARLETTE = tuple(map(int, starlette_version.split(".")[:2]))


def starlette(endpoint: Endpoint, middlewares: list[Any], **options: Any) -> Starlette:
    app = Starlette(routes=[Route("/", endpoint)])
    for middleware in middlewares:
        app.add_middleware(middleware)
    add_starlette_http_db_session_middleware(app, **options)
    return app


def starlette_with_a_list(endpoint: Endpoint, middlewares: list[Any], **options: Any) -> Starlette:
    outside_in = [Middleware(StarletteHTTPDBSessionMiddleware, **options)]
    outside_in += [Middleware(middleware) for middleware in reversed(middlewares)]
    return Starlette(routes=[Route("/", endpoint)], middleware=outside_in)


def fastapi(endpoint: Endpoint, middlewares: list[Any], **options: Any) -> FastAPI:
    app = FastAPI()
    app.router.routes.append(Route("/", endpoint))
    for middleware in middlewares:
        app.add_middleware(middleware)
    add_fastapi_http_db_session_middleware(app, **options)
    return app


def pure_asgi(endpoint: Endpoint, middlewares: list[Any], **options: Any) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)

    inner: ASGIApp = app
    for middleware in middlewares:
        inner = middleware(inner)
    return ASGIHTTPDBSessionMiddleware(inner, **options)


def around_an_application(endpoint: Endpoint, middlewares: list[Any], **options: Any) -> ASGIApp:
    app = Starlette(routes=[Route("/", endpoint)], middleware=[*map(Middleware, middlewares)])
    return ASGIHTTPDBSessionMiddleware(app, **options)


def mounted(endpoint: Endpoint, middlewares: list[Any], **options: Any) -> Starlette:
    inner = FastAPI()
    inner.router.routes.append(Route("/", endpoint))
    for middleware in middlewares:
        inner.add_middleware(middleware)
    app = Starlette(routes=[Mount("/", app=inner)])
    add_starlette_http_db_session_middleware(app, **options)
    return app


def of_a_route(endpoint: Endpoint, middlewares: list[Any], **options: Any) -> Starlette:
    route = Route("/", endpoint, middleware=[*map(Middleware, middlewares)])
    app = Starlette(routes=[Mount("/", routes=[route])])
    add_starlette_http_db_session_middleware(app, **options)
    return app


# Where else another middleware may be, inside of ours.
PLACES = [around_an_application, mounted, of_a_route]


def _cases() -> list[Any]:
    each: list[list[Any]] = [[], *([middleware] for middleware in LATE), LATE]
    pairs: list[tuple[MakeApp, list[Any]]] = [(starlette, middlewares) for middlewares in each]
    for make in (starlette_with_a_list, fastapi, pure_asgi, *PLACES):
        pairs += [(make, middlewares) for middlewares in ([Holding], [Spawning], LATE)]
    return [
        pytest.param(make, middlewares, id="-".join(m.__name__ for m in (make, *middlewares)))
        for make, middlewares in pairs
    ]


every_case = pytest.mark.parametrize(("make", "middlewares"), _cases())


async def get(app: Any, *, raises: bool = False) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get("/")


@every_case
@pytest.mark.parametrize("knows_length", [False, True])
async def test_a_cursor_that_the_body_has_opened_is_read_to_its_end(
    connect: DBConnect, make: MakeApp, middlewares: list[Any], knows_length: bool
) -> None:
    lines = [f"{number}\n" for number in range(1, ROWS + 1)]
    headers = {"content-length": str(len("".join(lines)))} if knows_length else {}

    async def body() -> AsyncGenerator[str]:
        session = await db_session(connect)
        numbers = await session.stream_scalars(text(f"SELECT generate_series(1, {ROWS})"))
        async for number in numbers:
            yield f"{number}\n"

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(body(), headers=headers)

    response = await get(make(endpoint, middlewares))
    assert response.status_code == 200
    assert response.text == "".join(lines)
    assert connections_out(connect) == 0


@every_case
async def test_what_the_handler_did_is_committed_before_its_body_begins(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    seen: list[list[str]] = []

    async def body() -> AsyncGenerator[str]:
        seen.append(await database.names())
        for name in ("b", "c"):
            await add(connect, name)
            yield name
            seen.append(await database.names())

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body())

    assert (await get(make(endpoint, middlewares))).text == "bc"
    # And what the body does is not committed before it is complete.
    assert seen == [["a"]] * 3
    assert await database.names() == ["a", "b", "c"]
    assert connections_out(connect) == 0


@every_case
@pytest.mark.parametrize("yields_first", [False, True])
async def test_what_a_body_did_that_fails_is_rolled_back_whole(
    connect: DBConnect,
    database: Database,
    make: MakeApp,
    middlewares: list[Any],
    yields_first: bool,
) -> None:
    async def body() -> AsyncGenerator[str]:
        if yields_first:
            yield "begins"
        for name in ("b", "c", "d"):
            await add(connect, name)
            yield name
        raise ValueError

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body())

    with pytest.raises((ValueError, ExceptionGroup)):
        await get(make(endpoint, middlewares), raises=True)
    assert await database.names() == ["a"]
    assert connections_out(connect) == 0


class Reading(BaseHTTPMiddleware):
    """Makes another response of the body, as what changes it does."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        return Response(b"".join([part async for part in response.body_iterator]))


@pytest.mark.parametrize("length", [None, 1])
@pytest.mark.parametrize("make", ["starlette", "dispatched"])
async def test_a_body_that_fails_is_told_of_even_if_another_middleware_makes_an_empty_one_of_it(
    connect: DBConnect, database: Database, make: str, length: int | None
) -> None:
    async def body() -> AsyncGenerator[str]:
        await add(connect, "b")
        raise ValueError
        yield "b"

    async def endpoint(_: Request) -> Response:
        headers = {} if length is None else {"content-length": str(length)}
        return StreamingResponse(body(), headers=headers)

    app = {"starlette": starlette, "dispatched": dispatched}[make](endpoint, [Reading])
    assert (await get(app)).status_code == 500
    assert await database.names() == []
    assert connections_out(connect) == 0


async def test_another_middleware_outside_ends_a_body_that_fails_as_if_it_were_whole(
    connect: DBConnect, database: Database
) -> None:
    async def body() -> AsyncGenerator[str]:
        yield "a"
        await add(connect, "b")
        raise ValueError

    async def endpoint(_: Request) -> Response:
        return StreamingResponse(body())

    app = starlette(endpoint, [])
    app.add_middleware(Spawning)
    async with http_client(app, log_level="critical") as client:
        assert (await client.get("/")).text == "a", "as the page says"
    assert await database.names() == []
    assert connections_out(connect) == 0


def dispatched(endpoint: Endpoint, middlewares: list[Any]) -> Starlette:
    app = Starlette(routes=[Route("/", endpoint)])
    for middleware in middlewares:
        app.add_middleware(middleware)
    app.add_middleware(BaseHTTPMiddleware, dispatch=starlette_http_db_session_middleware)
    return app


@pytest.mark.parametrize(
    ("make", "middlewares"),
    [*_cases(), *((dispatched, middlewares) for middlewares in ([], [Spawning], [Holding]))],
)
async def test_what_a_body_did_whose_client_has_left_is_rolled_back_whole(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    left = asyncio.Event()

    async def body() -> AsyncGenerator[str]:
        for name in ("b", "c"):
            await add(connect, name)
            yield name
            left.set()
            await asyncio.sleep(10)

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body())

    scope = {**http_scope(), "query_string": b"", "asgi": {"spec_version": "2.3"}}
    messages: list[Message] = [{"type": "http.request", "body": b""}]

    async def receive() -> Message:
        if not messages:
            await left.wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(_: Message) -> None:
        pass

    with suppress(RuntimeError):  # of Starlette, if the other middleware has not passed on a start
        await make(endpoint, middlewares)(scope, receive, send)
    assert await database.names() == ["a"]
    assert connections_out(connect) == 0


@every_case
async def test_a_handler_that_refuses_is_rolled_back_and_its_body_is_not(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    async def body() -> AsyncGenerator[str]:
        for name in ("b", "c"):
            await add(connect, name)
            yield name

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body(), 409)

    assert (await get(make(endpoint, middlewares))).status_code == 409
    # As without a middleware: who has the whole body of an error may rely on what it says.
    assert await database.names() == ["b", "c"]


@every_case
async def test_a_commit_of_the_handler_that_fails_is_answered_with_an_error(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    async def body() -> AsyncGenerator[str]:
        await add(connect, "b")
        yield "b"

    async def endpoint(_: Request) -> Response:
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=1)])
        return StreamingResponse(body())

    assert (await get(make(endpoint, middlewares))).status_code == 500
    assert (await database.seats(), await database.names()) == ([], [])
    assert connections_out(connect) == 0


@every_case
async def test_a_commit_of_the_body_that_fails_is_no_success(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    async def body() -> AsyncGenerator[str]:
        (await db_session(connect)).add_all([Seat(number=1), Seat(number=1)])
        yield "b"

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body())

    with pytest.raises((IntegrityError, ExceptionGroup)):
        await get(make(endpoint, middlewares), raises=True)
    assert (await database.seats(), await database.names()) == ([], ["a"])
    assert connections_out(connect) == 0


@every_case
async def test_a_response_that_is_not_streamed_goes_by_its_status(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    async def endpoint(request: Request) -> Response:
        await add(connect, f"a {request.query_params}")
        return JSONResponse("x" * ROWS, int(request.query_params["status"]))

    app = make(endpoint, middlewares)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for status in (201, 303, 409):
            assert (await client.get(f"/?status={status}")).status_code == status
    assert await database.names() == ["a status=201", "a status=303"]


@every_case
async def test_a_cursor_of_the_handler_is_read_if_the_commit_comes_after_the_response(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    async def endpoint(_: Request) -> Response:
        commit_after_response()
        session = await add(connect, "a")
        numbers = await session.stream_scalars(text(f"SELECT generate_series(1, {ROWS})"))

        async def body() -> AsyncGenerator[str]:
            async for number in numbers:
                yield f"{number}\n"

        return StreamingResponse(body())

    assert len((await get(make(endpoint, middlewares))).text.split()) == ROWS
    assert await database.names() == ["a"]
    assert connections_out(connect) == 0


@every_case
async def test_a_background_task_has_a_transaction_of_its_own(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    if Spawning in middlewares and STARLETTE < (1, 7):
        pytest.skip("it may begin before the commit, as the page says")
    seen: list[list[str]] = []

    async def later() -> None:
        seen.append(await database.names())
        await add(connect, "d")

    async def body() -> AsyncGenerator[str]:
        for name in ("b", "c"):
            await add(connect, name)
            yield name

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body(), background=BackgroundTask(later))

    assert (await get(make(endpoint, middlewares))).text == "bc"
    assert seen == [["a", "b", "c"]]
    assert await database.names() == ["a", "b", "c", "d"]


@pytest.mark.usefixtures("no_pauses")
@every_case
async def test_a_commit_of_the_handler_that_loses_a_race_is_tried_again(
    connect: DBConnect, database: Database, make: MakeApp, middlewares: list[Any]
) -> None:
    fail = Failing(2)

    async def body() -> AsyncGenerator[str]:
        await add(connect, "b")
        yield "b"

    async def endpoint(_: Request) -> Response:
        await add(connect, "a")
        return StreamingResponse(body())

    app = make(endpoint, middlewares, attempts=3, before_commit=lambda _: fail())
    assert (await get(app)).text == "b"
    assert await database.names() == ["a", "b"]
    assert fail.calls == 4  # the third attempt, and the body
