"""An application whose requests are in the transaction of a test, and what a transaction sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy import URL, Connection, event, insert, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    run_in_new_ctx,
)
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from tests.helpers.models import Item, Seat


class Served:
    """An application on a connect, called by the clients of the tests.

    Attributes:
        called: What callbacks of on_commit have said.
        may_go_on: What a request to /wait waits for, in its transaction.
        is_waiting: Whether one does.
    """

    def __init__(self, connect: DBConnect) -> None:
        self.connect = connect
        self.called: list[str] = []
        self.may_go_on = asyncio.Event()
        self.is_waiting = asyncio.Event()
        handlers = [self.add, self.refuse, self.wait, self.nested, self.modes, self.swallow]
        handlers += [self.crash, self.stream, self.background, self.outer_fails, self.apart]
        handlers += [self.seat, self.level, self.names]
        routes = [Route(f"/{h.__name__}/{{name}}", h) for h in handlers]
        self.app = Starlette(routes=routes)
        add_starlette_http_db_session_middleware(self.app)

        async def conflict(_: Request, __: Exception) -> JSONResponse:
            return JSONResponse({}, status_code=409)

        self.app.add_exception_handler(IntegrityError, conflict)

    async def insert(self, name: str) -> None:
        session = await db_session(self.connect)
        session.add(Item(name=name))
        await session.flush()

    async def add(self, request: Request) -> Response:
        name = request.path_params["name"]
        session = await db_session(self.connect)
        session.add(Item(name=name))  # flushed by the commit
        on_commit(self.connect, partial(self.called.append, name))
        return JSONResponse({})

    async def names(self, request: Request) -> Response:
        return JSONResponse(await names_in(await db_session(self.connect)))

    async def refuse(self, request: Request) -> Response:
        await self.insert(request.path_params["name"])
        on_commit(self.connect, partial(self.called.append, "refused"))
        return JSONResponse({}, status_code=422)

    async def crash(self, request: Request) -> Response:
        await self.insert(request.path_params["name"])
        raise ZeroDivisionError

    async def wait(self, request: Request) -> Response:
        await self.insert(request.path_params["name"])
        self.is_waiting.set()
        await self.may_go_on.wait()
        return JSONResponse({})

    async def nested(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)
        async with new_db_session_ctx():
            await self.insert(f"{name} in a context")
        with suppress(ZeroDivisionError):
            async with new_db_session_ctx():
                await self.insert(f"{name} undone")
                raise ZeroDivisionError
        await asyncio.gather(*(run_in_new_ctx(self.insert, f"{name} in {n}") for n in range(3)))
        async with new_non_ctx_session(self.connect) as session:
            session.add(Item(name=f"{name} in no context"))
            await session.commit()
        async with new_non_ctx_atomic_session(self.connect) as session:
            session.add(Item(name=f"{name} atomic"))
        await self.insert(f"{name} at the end")
        return JSONResponse({})

    async def modes(self, request: Request) -> Response:
        name = request.path_params["name"]
        connect = self.connect
        await self.insert(f"{name} 1")
        async with atomic_db_session(connect) as session:  # commits 1 before, 2 after
            session.add(Item(name=f"{name} 2"))
        await self.insert("rolled back")
        async with atomic_db_session(connect, "rollback") as session:
            session.add(Item(name=f"{name} 3"))
        await self.insert(f"{name} 4")
        async with atomic_db_session(connect, "append") as session:
            session.add(Item(name=f"{name} 5"))
        await self.insert(f"{name} 6")
        with pytest.raises(InvalidRequestError):
            async with atomic_db_session(connect, "raise"):
                pytest.fail("the block must not run")
        with suppress(IntegrityError):
            async with atomic_db_session(connect, "savepoint") as session:
                session.add(Item(name=f"{name} 6"))
        async with atomic_db_session(connect, "savepoint") as session:
            session.add(Item(name=f"{name} 7"))
        return JSONResponse({})

    async def swallow(self, request: Request) -> Response:
        with suppress(IntegrityError):
            session = await db_session(self.connect)
            await session.execute(insert(Item).values(name=request.path_params["name"]))
        return JSONResponse({})

    async def stream(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)

        async def body() -> AsyncGenerator[bytes]:
            yield b"a"
            await self.insert(f"{name} in the body")

        return StreamingResponse(body())

    async def background(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)
        return Response(background=BackgroundTask(self.insert, f"{name} in the background"))

    async def outer_fails(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self.insert(name)
        async with new_db_session_ctx():
            await self.insert(f"{name} inside")
        return JSONResponse({}, status_code=400)

    async def apart(self, request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.gather(*(run_in_new_ctx(self.insert, f"{name} {n}") for n in range(5)))
        return JSONResponse({})

    async def seat(self, request: Request) -> Response:
        session = await db_session(self.connect)
        session.add(Seat(number=int(request.path_params["name"])))
        return JSONResponse({})

    async def level(self, request: Request) -> Response:
        session = await db_session(self.connect)
        await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await self.insert(request.path_params["name"])
        return JSONResponse({})


def create_sqlite_engine(url: URL) -> AsyncEngine:
    """Make an engine as SQLAlchemy's page on SQLite tells to."""
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def do_connect(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def do_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


async def names_after(connect: DBConnect) -> list[str]:
    """Return the names of the items, seen by another transaction."""
    async with new_non_ctx_session(connect) as session:
        return await names_in(session)


async def names_in(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(Item.name).order_by(Item.id)))
