"""The library during the move: its endpoints take their session as before, a service does not."""

import os
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_non_ctx_session,
)
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from examples.moving.models import Base, Entry, Loan

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///library.db")
connect = DBConnect.from_url(DATABASE_URL)

app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)

get_session = DBSessionDependency(connect)
Session = Annotated[AsyncSession, Depends(get_session)]


async def lend(session: AsyncSession, book: str, reader: str) -> None:
    session.add(Loan(book=book, reader=reader))
    await note(f"{reader} takes {book}")


async def note(text: str) -> None:
    session = await db_session(connect)
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
        await note(f"nobody had {book}")
        await session.commit()
        raise HTTPException(404)
    await session.delete(loan)
    await session.commit()
    background.add_task(thank, loan.reader)


async def thank(reader: str) -> None:
    async with new_non_ctx_session(connect) as session:
        session.add(Entry(text=f"thank you, {reader}"))
        await session.commit()
