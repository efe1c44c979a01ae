"""The library with 2.1.9; it runs here as it is."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import BackgroundTasks, FastAPI, HTTPException
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from examples.moving.models import Base, Entry, Loan

DATABASE_URL = make_url(
    os.environ.get("DATABASE_URL", "postgresql+asyncpg://localhost/library")
)


def create_engine(host: str) -> AsyncEngine:
    return create_async_engine(DATABASE_URL.set(host=host), pool_size=5)


def create_session_maker(
    engine: AsyncEngine,
) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


connect = DBConnect(create_engine, create_session_maker, DATABASE_URL.host)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with new_non_ctx_atomic_session(connect) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    yield
    await connect.close()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


async def lend(book: str, reader: str) -> None:
    session = await db_session(connect)
    session.add(Loan(book=book, reader=reader))
    await note(f"{reader} takes {book}")


async def note(text: str) -> None:
    session = await db_session(connect)
    session.add(Entry(text=text))


@app.post("/loans/{book}/{reader}", status_code=201)
async def borrow(book: str, reader: str) -> None:
    await lend(book, reader)
    try:
        await commit_db_session(connect)
    except IntegrityError:
        raise HTTPException(409, "somebody has it") from None


@app.delete("/loans/{book}", status_code=204)
async def give_back(book: str, background: BackgroundTasks) -> None:
    session = await db_session(connect)
    loan = await session.get(Loan, book)
    if loan is None:
        await note(f"nobody had {book}")
        await commit_db_session(connect)
        raise HTTPException(404)
    await session.delete(loan)
    background.add_task(thank, loan.reader)


async def thank(reader: str) -> None:
    await run_in_new_ctx(note, f"thank you, {reader}")
