"""Write on the primary, read on a replica, and read your own writes."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, Response
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from context_async_sqlalchemy import (
    DBConnect,
    close_db_session,
    db_session,
    new_db_session_ctx,
    on_commit,
)
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from context_async_sqlalchemy.postgres import keep_on_primary, keep_on_replica

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres")
HOSTS = os.environ.get("DATABASE_HOSTS", "127.0.0.1,127.0.0.2").split(",")
primary = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_primary(HOSTS),
)
replica = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_replica(HOSTS, max_lag=10),
    isolation_level="AUTOCOMMIT",
    connect_args={"server_settings": {"default_transaction_read_only": "on"}},
)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "replicated_note"

    body: Mapped[str] = mapped_column(primary_key=True)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with primary, replica:
        async with new_db_session_ctx():
            session = await db_session(primary)
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


UNKNOWN = "FFFFFFFF/FFFFFFFF"  # a position no replica ever reaches
written: ContextVar[list[str]] = ContextVar("written")


async def session_to_write(response: Response) -> AsyncSession:
    written.get().append(UNKNOWN)
    on_commit(primary, note_position)
    response.headers["Served-By"] = "primary"
    return await db_session(primary)


async def note_position() -> None:
    session = await db_session(primary)
    position = "SELECT CAST(pg_current_wal_insert_lsn() AS text)"
    written.get().append((await session.execute(text(position))).scalar_one())


PATIENCE = 1.0  # seconds a replica has to catch up with a position
Position = Annotated[str, Cookie(pattern="^[0-9A-F]{1,8}/[0-9A-F]{1,8}$")]

# asyncpg accepts a string only for a text parameter.
STATE = text(
    """
    SELECT CASE WHEN pg_is_in_recovery() THEN 'replica' ELSE 'primary' END,
      NOT pg_is_in_recovery()
      OR pg_last_wal_replay_lsn() >= CAST(CAST(:position AS text) AS pg_lsn)
    """
)


async def session_to_read(response: Response, position: Position = "0/0") -> AsyncSession:
    if position != UNKNOWN:
        try:
            async with asyncio.timeout(2 * PATIENCE):  # for a replica that does not answer
                response.headers["Served-By"] = await wait_for_replica(position)
            return await db_session(replica)
        except Exception as error:  # behind, silent or dead: the primary answers
            logging.info("No replica for %s: %r", position, error)
            await close_db_session(replica)
    response.headers["Served-By"] = "primary"
    return await db_session(primary)


async def wait_for_replica(position: str) -> str:
    deadline = time.monotonic() + PATIENCE
    while True:
        session = await db_session(replica)
        role, has_replayed = (await session.execute(STATE, {"position": position})).one()
        if has_replayed:
            return str(role)
        await close_db_session(replica)  # hold no connection during the sleep
        if time.monotonic() > deadline:
            raise TimeoutError("the replica is behind")
        await asyncio.sleep(0.05)


class PositionCookie:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        positions: list[str] = []
        written.set(positions)

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and positions:
                cookie = f"position={positions[-1]}; Max-Age=60; Path=/; HttpOnly; SameSite=Lax"
                MutableHeaders(scope=message).append("Set-Cookie", cookie)
            await send(message)

        await self.app(scope, receive, send_with_cookie)


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)
app.add_middleware(PositionCookie)  # added last, so it runs first


@app.post("/notes/{body}", status_code=201)
async def add_note(body: str, session: Annotated[AsyncSession, Depends(session_to_write)]) -> None:
    session.add(Note(body=body))


@app.get("/notes")
async def notes(session: Annotated[AsyncSession, Depends(session_to_read)]) -> list[str]:
    return list(await session.scalars(select(Note.body).order_by(Note.body)))
