"""Write on the primary, read on a replica, and read your own writes."""

import os
import secrets

from fastapi import FastAPI, Response
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_database_exception_handlers,
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from context_async_sqlalchemy.postgres import keep_on_primary, keep_on_replica
from context_async_sqlalchemy.replicas import Replicated, on_primary, on_replica

DATABASE_URL = os.environ.get(
    "DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"
)
HOSTS = os.environ.get("DATABASE_HOSTS", "127.0.0.1,127.0.0.2").split(",")
SECRET = (
    os.environ.get("COOKIE_SECRET") or secrets.token_hex()
)  # of this process alone

primary = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_primary(HOSTS),
)
replica = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_replica(HOSTS, max_lag=10),
)
fallback = DBConnect.from_url(
    DATABASE_URL,
    before_create_session_handler=keep_on_primary(HOSTS),
    pool_size=5,
    max_overflow=0,
    pool_timeout=1,
)
database = Replicated(
    primary,
    replica,
    fallback=fallback,
    secret=SECRET,
    secure=False,  # for a trial without HTTPS
)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "replicated_note"

    body: Mapped[str] = mapped_column(primary_key=True)


app = FastAPI(lifespan=database_lifespan(database, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app, attempts=2)
add_database_exception_handlers(app)


@app.post("/notes/{body}", status_code=201)
async def add_note(body: str) -> None:
    session = await db_session(database)
    session.add(Note(body=body))


@app.get("/notes")
async def notes(response: Response) -> list[str]:
    session = await db_session(database)
    is_replica = await session.scalar(select(func.pg_is_in_recovery()))
    response.headers["Served-By"] = "replica" if is_replica else "primary"
    return list(await session.scalars(select(Note.body).order_by(Note.body)))


@app.get("/notes/{body}/take")  # a link in a mail, which writes all the same
async def take_note(body: str) -> bool:
    with on_primary():
        session = await db_session(database)
    note = await session.get(Note, body)
    if note is not None:
        await session.delete(note)
    return note is not None


@app.post("/reports", status_code=202)
async def make_report() -> int | None:
    with on_replica():
        return await run_in_new_ctx(count_notes)


async def count_notes() -> int | None:
    session = await db_session(database)
    return await session.scalar(select(func.count()).select_from(Note))
