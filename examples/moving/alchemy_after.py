"""The library with the services of advanced-alchemy, on the session of the context."""

import os
from typing import Annotated

from advanced_alchemy.base import DefaultBase
from advanced_alchemy.exceptions import IntegrityError
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from examples.moving.alchemy_services import DiaryService, LoanService

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///library.db")
connect = DBConnect.from_url(DATABASE_URL)

app = FastAPI(
    lifespan=database_lifespan(connect, create_tables=DefaultBase.metadata)
)
add_fastapi_http_db_session_middleware(app)


async def loan_service() -> LoanService:
    return LoanService(session=await db_session(connect))


async def diary_service() -> DiaryService:
    return DiaryService(session=await db_session(connect))


Loans = Annotated[LoanService, Depends(loan_service)]
Diary = Annotated[DiaryService, Depends(diary_service)]


@app.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "somebody has it"}, status_code=409)


@app.post("/loans/{book}/{reader}", status_code=201)
async def borrow(book: str, reader: str, loans: Loans, diary: Diary) -> None:
    await loans.create({"book": book, "reader": reader})
    await diary.create({"text": f"{reader} takes {book}"})


@app.delete("/loans/{book}", status_code=204)
async def give_back(
    book: str, loans: Loans, diary: Diary, background: BackgroundTasks
) -> None:
    loan = await loans.get_one_or_none(book=book)
    if loan is None:
        await diary.create({"text": f"nobody had {book}"}, auto_commit=True)
        raise HTTPException(404)
    await loans.delete(book)
    background.add_task(thank, loan.reader)


async def thank(reader: str) -> None:
    diary = await diary_service()
    await diary.create({"text": f"thank you, {reader}"})
