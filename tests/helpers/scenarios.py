"""Requests, and what each promises to store, for the tests that let something fail at each point.

How a request writes, and what it is served by, are settings: each request can have each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import insert, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    init_db_session_ctx,
    on_commit,
    reset_db_session_ctx,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.asgi import respond
from tests.helpers.models import Item, Transfer
from tests.helpers.raw import raw_of

MORE = {"type": "http.response.body", "body": b"x", "more_body": True}
START = {"type": "http.response.start", "status": 200, "headers": []}

# SQLAlchemy begins a transaction with its first statement. A failure of that is not swallowed: what
# comes next is in another transaction, which is as good as any.
BEGIN = text("SELECT 1")

Write: TypeAlias = Callable[[AsyncSession, str], Awaitable[None]]


async def write_plainly(session: AsyncSession, name: str) -> None:
    await session.execute(insert(Item).values(name=name))


async def write_and_swallow(session: AsyncSession, name: str) -> None:
    """Go on after an error, as if the row was there."""
    await session.execute(BEGIN)
    with suppress(SQLAlchemyError):
        await write_plainly(session, name)


async def write_at_the_driver(session: AsyncSession, name: str) -> None:
    """Write below SQLAlchemy, and go on after an error."""
    await session.execute(BEGIN)
    raw = await raw_of(session)
    with suppress(Exception):
        await raw.execute(f"INSERT INTO item (name) VALUES ('{name}')")


async def write_on_two_engines(session: AsyncSession, name: str) -> None:
    """Write an item, and an entry of the ledger, which the session takes to another engine."""
    await write_plainly(session, name)
    await session.execute(insert(Transfer).values(key=name, source=0, target=0, amount=0))


way_to_write: ContextVar[Write] = ContextVar("way_to_write", default=write_plainly)


async def add(connect: DBConnect, name: str) -> None:
    """Write a row with the context's session."""
    await way_to_write.get()(await db_session(connect), name)


@dataclass
class Rows:
    """What a request writes.

    Attributes:
        promised: The rows that are stored if the client was told 2xx.
        promised_by_body: The rows that are stored if the client has the whole body.
        together: Sets of rows that are stored all together or not at all.
        first: The row that is stored if any other is.
    """

    promised: set[str]
    promised_by_body: set[str] = field(default_factory=set)
    together: list[set[str]] = field(default_factory=list)
    first: str | None = None


MakeApp: TypeAlias = Callable[[DBConnect, DBConnect, Any], ASGIApp]


@dataclass
class Scenario:
    """A request.

    Attributes:
        make_app: Makes the application, with two connects, and with a middleware inside ours if the
            third argument is one.
        rows: What it writes.
    """

    make_app: MakeApp
    rows: Rows


SCENARIOS: dict[str, Scenario] = {}


def scenario(rows: Rows, **options: Any) -> Callable[[Callable[..., Awaitable[None]]], None]:
    """Register a function that handles a request as a scenario."""

    def register(handle: Callable[..., Awaitable[None]]) -> None:
        def make_app(connect: DBConnect, second: DBConnect, middleware: Any = None) -> ASGIApp:
            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await handle(connect, second, send)

            inner = app if middleware is None else middleware(app)
            return ASGIHTTPDBSessionMiddleware(inner, **options)

        SCENARIOS[handle.__name__] = Scenario(make_app, rows)

    return register


@scenario(Rows(promised={"a", "b"}, together=[{"a", "b"}]))
async def plain_write(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await add(connect, "b")
    await respond(send)


@scenario(Rows(promised={"a", "b"}))
async def two_connects(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await add(second, "b")
    await respond(send)


@scenario(Rows(promised={"a"}, promised_by_body={"b", "c"}, together=[{"b", "c"}]))
async def streamed_body(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await send(START.copy())
    for name in "bc":
        await add(connect, name)
        await send(MORE.copy())
    await send({"type": "http.response.body"})


@scenario(Rows(promised={"a"}))
async def background_task(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await respond(send)
    await add(connect, "b")


@scenario(Rows(promised={"a", "b", "c"}, together=[{"a", "b"}]))
async def atomic_block(connect: DBConnect, _: DBConnect, send: Send) -> None:
    async with atomic_db_session(connect):
        await add(connect, "a")
        await add(connect, "b")
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a", "b", "c"}))
async def gathered_contexts(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await asyncio.gather(run_in_new_ctx(add, connect, "a"), run_in_new_ctx(add, second, "b"))
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a", "c"}))
async def early_commit_and_close(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await commit_db_session(connect)
    await add(connect, "not committed")
    await close_db_session(connect)
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised=set()))
async def two_connects_rolled_back(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await add(connect, "not committed")
    await add(second, "not committed either")
    await respond(send, 400)


@scenario(Rows(promised={"c"}))
async def two_connects_closed(connect: DBConnect, second: DBConnect, send: Send) -> None:
    token = init_db_session_ctx(force=True)
    try:
        await add(connect, "not committed")
        await add(second, "not committed either")
    finally:
        await reset_db_session_ctx(token)
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a", "c"}, together=[{"a", "c"}]))
async def savepoint_undone(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    with suppress(ValueError):
        async with atomic_db_session(connect, "savepoint"):
            await add(connect, "not committed")
            raise ValueError
    await add(connect, "c")
    await respond(send)


@scenario(Rows(promised={"a"}, first="a"))
async def callbacks_after_commit(connect: DBConnect, second: DBConnect, send: Send) -> None:
    await add(connect, "a")
    on_commit(connect, partial(add, connect, "called"))
    on_commit(connect, partial(add, second, "called too"))
    await respond(send)


@scenario(Rows(promised={"a", "b"}, together=[{"a", "b"}]), attempts=3)
async def tried_again(connect: DBConnect, _: DBConnect, send: Send) -> None:
    await add(connect, "a")
    await add(connect, "b")
    await respond(send)


def make_fastapi_app(connect: DBConnect, _: DBConnect, middleware: Any = None) -> FastAPI:
    app = FastAPI()
    if middleware is not None:
        app.add_middleware(middleware)
    add_fastapi_http_db_session_middleware(app)

    async def dependency() -> AsyncGenerator[None]:
        await add(connect, "a")
        yield
        # FastAPI runs this before the response or after it, depending on its version.
        await add(connect, "c")

    @app.get("/", dependencies=[Depends(dependency)])
    async def endpoint() -> JSONResponse:
        await add(connect, "b")
        return JSONResponse({})

    return app


SCENARIOS["yield_dependency"] = Scenario(
    make_fastapi_app, Rows(promised={"a", "b"}, together=[{"a", "b"}])
)


def make_starlette_app(connect: DBConnect, _: DBConnect, middleware: Any = None) -> Starlette:
    async def endpoint(__: Request) -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            for name in "bc":
                await add(connect, name)
                yield name

        await add(connect, "a")
        return StreamingResponse(body(), background=BackgroundTask(add, connect, "d"))

    app = Starlette(routes=[Route("/", endpoint)])
    if middleware is not None:
        app.add_middleware(middleware)
    add_starlette_http_db_session_middleware(app)
    return app


SCENARIOS["streaming_response"] = Scenario(
    make_starlette_app,
    Rows(promised={"a"}, promised_by_body={"b", "c"}, together=[{"b", "c"}]),
)
