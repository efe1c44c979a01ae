from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy import text

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware

connect = DBConnect.from_url("sqlite:///notes.db")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(text("CREATE TABLE IF NOT EXISTS note (body TEXT UNIQUE)"))
    yield
    await connect.close()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.post("/notes/{body}", status_code=201)
async def add_note(body: str) -> None:
    session = await db_session(connect)
    await session.execute(text("INSERT INTO note VALUES (:body)"), {"body": body})
