"""Documents whose words are counted after the response."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

from fastapi import BackgroundTasks, FastAPI, Query, Response
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///documents.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "counted_document"

    name: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]
    words: Mapped[int | None]


class Visitor(Base):
    __tablename__ = "refused_visitor"

    name: Mapped[str] = mapped_column(primary_key=True)


running: set[asyncio.Task[None]] = set()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with database_lifespan(connect, create_tables=Base.metadata)(app):
        yield
        await asyncio.gather(*running, return_exceptions=True)


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


async def count_words(name: str) -> None:
    session = await db_session(connect)
    document = await session.get_one(Document, name)
    document.words = len(document.body.split())


@app.post("/documents/{name}", status_code=202)
async def add_document(
    name: str, body: str, background: BackgroundTasks
) -> None:
    session = await db_session(connect)
    session.add(Document(name=name, body=body))
    background.add_task(count_words, name)


Names = Annotated[str, Query(pattern="^[^,]+(,[^,]+){0,99}$")]  # at most 100


@app.post("/recounts", status_code=202)
async def recount(names: Names, background: BackgroundTasks) -> None:
    for name in names.split(","):
        background.add_task(run_in_new_ctx, count_words, name)


def start_counting(name: str) -> None:
    task = asyncio.create_task(run_in_new_ctx(count_words, name))
    running.add(task)
    task.add_done_callback(running.discard)


@app.put("/documents/{name}")
async def replace_document(name: str, body: str) -> None:
    session = await db_session(connect)
    document = await session.get_one(Document, name)
    document.body = body
    on_commit(connect, partial(start_counting, name))


async def remember(visitor: str) -> None:
    session = await db_session(connect)
    session.add(Visitor(name=visitor))


@app.delete("/documents/{name}")
async def refuse_to_delete(
    visitor: str, background: BackgroundTasks, response: Response
) -> str:
    background.add_task(remember, visitor)
    response.status_code = 403
    return "documents are kept"
