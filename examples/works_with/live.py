"""Events of a browser: to it with sse-starlette, from it with python-socketio."""

import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import socketio
from fastapi import FastAPI
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sse_starlette import EventSourceResponse

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///messages.db")
)

P = ParamSpec("P")
T = TypeVar("T")


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "works_with_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


api = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(api)
sio = socketio.AsyncServer(async_mode="asgi")
app = socketio.ASGIApp(sio, other_asgi_app=api)


def event(
    handler: Callable[P, Awaitable[T]],
) -> Callable[P, Awaitable[T | str]]:
    """Handle an event: settled before it is answered."""

    @wraps(handler)
    async def handle(*args: P.args, **kwargs: P.kwargs) -> T | str:
        try:
            async with new_db_session_ctx():
                return await handler(*args, **kwargs)
        except Exception:
            logging.exception("An event failed")
            return "failed"

    sio.event(handle)
    return handle


@event
async def write(sid: str, text: str) -> str:
    session = await db_session(connect)
    session.add(Entry(text=text))
    if not text:
        raise ValueError("an entry is empty")
    return "stored"


@api.get("/entries")
async def get_entries() -> EventSourceResponse:
    return EventSourceResponse(read_entries())


async def read_entries() -> AsyncGenerator[dict[str, str]]:
    session = await db_session(connect)
    for text in await session.scalars(select(Entry.text).order_by(Entry.id)):
        yield {"data": text}
