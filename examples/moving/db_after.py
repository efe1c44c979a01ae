"""The library that had fastapi-async-sqlalchemy."""

import os

from fastapi import BackgroundTasks, FastAPI, HTTPException

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from examples.moving.models import Base, Entry, Loan

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///library.db")
connect = DBConnect.from_url(DATABASE_URL)

app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


async def note(text: str) -> None:
    session = await db_session(connect)
    session.add(Entry(text=text))


@app.post("/loans/{book}/{reader}", status_code=201)
async def borrow(book: str, reader: str) -> None:
    session = await db_session(connect)
    if await session.get(Loan, book) is not None:
        raise HTTPException(409, "somebody has it")
    session.add(Loan(book=book, reader=reader))
    await note(f"{reader} takes {book}")


@app.delete("/loans/{book}", status_code=204)
async def give_back(book: str, background: BackgroundTasks) -> None:
    session = await db_session(connect)
    loan = await session.get(Loan, book)
    if loan is None:
        await note(f"nobody had {book}")
        await commit_db_session(connect)  # or the 404 would undo the note
        raise HTTPException(404)
    await session.delete(loan)
    background.add_task(thank, loan.reader)


async def thank(reader: str) -> None:
    await note(f"thank you, {reader}")
