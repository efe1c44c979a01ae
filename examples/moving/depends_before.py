"""A library whose endpoints pass their session to what they call, and commit it."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from examples.moving.models import Base, Entry, Loan

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///library.db")
engine = create_async_engine(DATABASE_URL)
maker = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def get_session() -> AsyncGenerator[AsyncSession]:
    async with maker() as session:
        yield session


Session = Annotated[AsyncSession, Depends(get_session)]


async def lend(session: AsyncSession, book: str, reader: str) -> None:
    session.add(Loan(book=book, reader=reader))
    await note(session, f"{reader} takes {book}")


async def note(session: AsyncSession, text: str) -> None:
    session.add(Entry(text=text))


@app.post("/loans/{book}/{reader}", status_code=201)
async def borrow(book: str, reader: str, session: Session) -> None:
    await lend(session, book, reader)
    try:
        await session.commit()
    except IntegrityError:
        raise HTTPException(409, "somebody has it") from None


@app.delete("/loans/{book}", status_code=204)
async def give_back(
    book: str, session: Session, background: BackgroundTasks
) -> None:
    loan = await session.get(Loan, book)
    if loan is None:
        await note(session, f"nobody had {book}")
        await session.commit()
        raise HTTPException(404)
    await session.delete(loan)
    await session.commit()
    background.add_task(thank, loan.reader)


async def thank(reader: str) -> None:
    async with maker() as session:
        await note(session, f"thank you, {reader}")
        await session.commit()
