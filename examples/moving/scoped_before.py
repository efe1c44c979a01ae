"""A library with a scoped session that routes, a middleware that removes it, and a decorator."""

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from fastapi import BackgroundTasks, FastAPI, HTTPException
from sqlalchemy import Delete, Engine, Insert, Update, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Receive, Scope, Send

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


session_id: ContextVar[str] = ContextVar("session_id")
session = async_scoped_session(
    async_sessionmaker(
        sync_session_class=RoutingSession, expire_on_commit=False
    ),
    scopefunc=session_id.get,
)


class SessionMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        token = session_id.set(str(uuid4()))
        try:
            await self.app(scope, receive, send)
        finally:
            await session.remove()
            session_id.reset(token)


def transactional(
    function: Callable[P, Awaitable[T]],
) -> Callable[P, Awaitable[T]]:
    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = await function(*args, **kwargs)
            await session.commit()
        except Exception:
            await session.rollback()
            raise
        return result

    return call


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with engines["writer"].begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    for engine in engines.values():
        await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.add_middleware(SessionMiddleware)


@transactional
async def lend(book: str, name: str) -> None:
    session.add(Loan(book=book, reader=name))
    await note(f"{name} takes {book}")


@transactional
async def take_back(book: str) -> str | None:
    loan = await session.get(Loan, book)
    if loan is None:
        return None
    await session.delete(loan)
    return loan.reader


@transactional
async def note(text: str) -> None:
    session.add(Entry(text=text))


@app.get("/diary")
async def diary() -> list[str]:
    return list(await session.scalars(select(Entry.text).order_by(Entry.id)))


@app.post("/loans/{book}/{name}", status_code=201)
async def borrow(book: str, name: str) -> None:
    try:
        await lend(book, name)
    except IntegrityError:
        raise HTTPException(409, "somebody has it") from None


@app.delete("/loans/{book}", status_code=204)
async def give_back(book: str, background: BackgroundTasks) -> None:
    name = await take_back(book)
    if name is None:
        await note(f"nobody had {book}")
        raise HTTPException(404)
    background.add_task(note, f"thank you, {name}")
