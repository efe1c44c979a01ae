"""The library with contexts instead of a scoped session; its session still routes."""

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Delete, Engine, Insert, Update, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    is_context_initiated,
    new_db_session_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from examples.moving.models import Base, Entry, Loan

P = ParamSpec("P")
T = TypeVar("T")

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///library.db")
engines = {
    "writer": create_async_engine(DATABASE_URL),
    "reader": create_async_engine(os.environ.get("READER_URL", DATABASE_URL)),
}


class RoutingSession(Session):
    def get_bind(
        self, mapper: Any = None, *, clause: Any = None, **_: Any
    ) -> Engine:
        writes = self._flushing or isinstance(clause, Insert | Update | Delete)
        return engines["writer" if writes else "reader"].sync_engine


def make_writer(_: str) -> AsyncEngine:
    return engines["writer"]


def make_sessionmaker(_: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(
        sync_session_class=RoutingSession, expire_on_commit=False
    )


connect = DBConnect(make_writer, make_sessionmaker, host="the writer's")


def transactional(
    function: Callable[P, Awaitable[T]],
) -> Callable[P, Awaitable[T]]:
    """Make a function a part of the unit of work there is, or one itself."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_context_initiated():
            return await function(*args, **kwargs)
        async with new_db_session_ctx():
            return await function(*args, **kwargs)

    return call


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with connect:  # which closes the writer
        async with engines["writer"].begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield
    await engines["reader"].dispose()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "somebody has it"}, status_code=409)


@transactional
async def lend(book: str, name: str) -> None:
    session = await db_session(connect)
    session.add(Loan(book=book, reader=name))
    await note(f"{name} takes {book}")


@transactional
async def take_back(book: str) -> str | None:
    session = await db_session(connect)
    loan = await session.get(Loan, book)
    if loan is None:
        return None
    await session.delete(loan)
    return loan.reader


@transactional
async def note(text: str) -> None:
    session = await db_session(connect)
    session.add(Entry(text=text))


@app.get("/diary")
async def diary() -> list[str]:
    session = await db_session(connect)
    return list(await session.scalars(select(Entry.text).order_by(Entry.id)))


@app.post("/loans/{book}/{name}", status_code=201)
async def borrow(book: str, name: str) -> None:
    await lend(book, name)


@app.delete("/loans/{book}", status_code=204)
async def give_back(book: str, background: BackgroundTasks) -> None:
    name = await take_back(book)
    if name is None:
        await note(f"nobody had {book}")
        await commit_db_session(connect)  # or the 404 would undo the note
        raise HTTPException(404)
    background.add_task(note, f"thank you, {name}")
