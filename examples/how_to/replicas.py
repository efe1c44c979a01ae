"""Write on the primary, read on a replica, and read your own writes."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, Response
from itsdangerous import BadSignature, TimestampSigner
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
from context_async_sqlalchemy.fastapi_utils import (
    add_database_exception_handlers,
    add_fastapi_http_db_session_middleware,
)
from context_async_sqlalchemy.postgres import keep_on_primary, keep_on_replica

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres")
HOSTS = os.environ.get("DATABASE_HOSTS", "127.0.0.1,127.0.0.2").split(",")
READ_ONLY = {"server_settings": {"default_transaction_read_only": "on"}}
PATIENCE = 1.0  # seconds a replica has to catch up with a position

primary = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_primary(HOSTS),
)
replica = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_replica(HOSTS, max_lag=10),
    isolation_level="AUTOCOMMIT",
    connect_args=READ_ONLY,
)
primary_to_read = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_primary(HOSTS),
    isolation_level="AUTOCOMMIT",
    connect_args=READ_ONLY,
    pool_size=5,
    max_overflow=0,
    pool_timeout=PATIENCE,
)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "replicated_note"

    body: Mapped[str] = mapped_column(primary_key=True)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with primary, replica, primary_to_read:
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


SECRET = os.environ.get("COOKIE_SECRET") or secrets.token_hex()  # of this process alone
MAX_AGE = 60  # seconds
signer = TimestampSigner(SECRET, salt="position")
waits = asyncio.Semaphore(20)  # requests that wait for a replica at a time


def signed_position(position: Annotated[str, Cookie()] = "") -> str:
    try:
        return signer.unsign(position, MAX_AGE).decode()
    except BadSignature:  # or too old, or none
        return "0/0"


Position = Annotated[str, Depends(signed_position)]

# asyncpg accepts a string only for a text parameter.
STATE = text(
    """
    SELECT CASE WHEN pg_is_in_recovery() THEN 'replica' ELSE 'primary' END,
      NOT pg_is_in_recovery()
      OR pg_last_wal_replay_lsn() >= CAST(CAST(:position AS text) AS pg_lsn)
    """
)


async def session_to_read(response: Response, position: Position) -> AsyncSession:
    if position != UNKNOWN:
        try:
            async with asyncio.timeout(2 * PATIENCE):  # for a replica that does not answer
                response.headers["Served-By"] = await wait_for_replica(position)
            return await db_session(replica)
        except Exception as error:  # behind, silent or dead: the primary answers
            logging.info("No replica for %s: %r", position, error)
            await close_db_session(replica)
    response.headers["Served-By"] = "primary"
    return await db_session(primary_to_read)


async def wait_for_replica(position: str) -> str:
    if role := await role_if_replayed(position):
        return role
    if waits.locked():
        raise TimeoutError("the replica is behind, and as many as may already wait for it")
    async with waits:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            await asyncio.sleep(0.05)
            if role := await role_if_replayed(position):
                return role
    raise TimeoutError("the replica is behind")


async def role_if_replayed(position: str) -> str | None:
    session = await db_session(replica)
    role, has_replayed = (await session.execute(STATE, {"position": position})).one()
    if has_replayed:
        return str(role)
    await close_db_session(replica)  # hold no connection until the next try
    return None


class PositionCookie:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        positions: list[str] = []
        written.set(positions)

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and positions:
                value = signer.sign(positions[-1]).decode()
                cookie = f"position={value}; Max-Age={MAX_AGE}; Path=/; HttpOnly; SameSite=Lax"
                MutableHeaders(scope=message).append("Set-Cookie", cookie)
            await send(message)

        await self.app(scope, receive, send_with_cookie)


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)
add_database_exception_handlers(app)
app.add_middleware(PositionCookie)  # added last, so it runs first


@app.post("/notes/{body}", status_code=201)
async def add_note(body: str, session: Annotated[AsyncSession, Depends(session_to_write)]) -> None:
    session.add(Note(body=body))


@app.get("/notes")
async def notes(session: Annotated[AsyncSession, Depends(session_to_read)]) -> list[str]:
    return list(await session.scalars(select(Note.body).order_by(Note.body)))
