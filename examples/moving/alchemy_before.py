"""The library with advanced-alchemy, which makes its sessions."""

import os
from typing import Annotated

from advanced_alchemy.exceptions import IntegrityError
from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    SQLAlchemyAsyncConfig,
)
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from examples.moving.alchemy_services import DiaryService, LoanService

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///library.db")
config = SQLAlchemyAsyncConfig(
    connection_string=DATABASE_URL,
    session_config=AsyncSessionConfig(expire_on_commit=False),
    commit_mode="autocommit",
    create_all=True,
)

app = FastAPI()
alchemy = AdvancedAlchemy(config=config, app=app)

Loans = Annotated[LoanService, Depends(alchemy.provide_service(LoanService))]
Diary = Annotated[DiaryService, Depends(alchemy.provide_service(DiaryService))]


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
    # The thanks come before the request is committed.
    await loans.delete(book, auto_commit=True)
    background.add_task(thank, loan.reader)


async def thank(reader: str) -> None:
    async with alchemy.with_async_session() as session:
        diary = DiaryService(session=session)
        await diary.create({"text": f"thank you, {reader}"}, auto_commit=True)
