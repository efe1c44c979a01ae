"""The library with fastapi-async-sqlalchemy."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

from examples.moving.models import Base, Entry, Loan

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///library.db")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with db():
        await (await db.session.connection()).run_sync(Base.metadata.create_all)
        await db.session.commit()
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    SQLAlchemyMiddleware, db_url=DATABASE_URL, commit_on_exit=True
)


async def note(text: str) -> None:
    db.session.add(Entry(text=text))


@app.post("/loans/{book}/{reader}", status_code=201)
async def borrow(book: str, reader: str) -> None:
    if await db.session.get(Loan, book) is not None:
        raise HTTPException(409, "somebody has it")
    db.session.add(Loan(book=book, reader=reader))
    await note(f"{reader} takes {book}")


@app.delete("/loans/{book}", status_code=204)
async def give_back(book: str, background: BackgroundTasks) -> None:
    loan = await db.session.get(Loan, book)
    if loan is None:
        await note(f"nobody had {book}")
        raise HTTPException(404)
    await db.session.delete(loan)
    background.add_task(thank, loan.reader)


async def thank(reader: str) -> None:
    async with db(commit_on_exit=True):
        await note(f"thank you, {reader}")
