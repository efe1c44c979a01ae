"""The library that was written for 2.1.9, with what has come since."""

import os

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError

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

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql://localhost/library")
connect = DBConnect.from_url(DATABASE_URL, pool_size=5)

app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


@app.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "somebody has it"}, status_code=409)


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
    await note(f"thank you, {reader}")
