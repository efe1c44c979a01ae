"""Notes, in FastAPI."""

import os
from collections.abc import AsyncGenerator

from fastapi import BackgroundTasks, FastAPI, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Column, MetaData, Table, Text, insert, select

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///notes.db")
)
metadata = MetaData()
note = Table("note", metadata, Column("title", Text))

app = FastAPI(lifespan=database_lifespan(connect, create_tables=metadata))
add_fastapi_http_db_session_middleware(app)


@app.post("/notes/{title}")
async def post_note(title: str) -> Response:
    return Response(status_code=await add_note(title))


@app.post("/notes/{title}/copy", status_code=202)
async def post_copy(title: str, background: BackgroundTasks) -> None:
    background.add_task(add_note, f"copy of {title}")


@app.get("/notes")
async def get_notes() -> StreamingResponse:
    return StreamingResponse(read_notes())


async def add_note(title: str) -> int:
    """Add a note; return the status: 409, for a duplicate, rolls it back."""
    session = await db_session(connect)
    await session.execute(insert(note).values(title=title))
    titles = (await session.scalars(select(note.c.title))).all()
    return 201 if titles.count(title) == 1 else 409


async def read_notes() -> AsyncGenerator[bytes]:
    session = await db_session(connect)
    for title in await session.scalars(select(note.c.title)):
        yield f"{title}\n".encode()
