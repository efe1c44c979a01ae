"""Notes, in Starlette."""

import os
from collections.abc import AsyncGenerator

from sqlalchemy import Column, MetaData, Table, Text, insert, select
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.starlette_utils import (
    add_starlette_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///notes.db")
)
metadata = MetaData()
note = Table("note", metadata, Column("title", Text))


async def post_note(request: Request) -> Response:
    return Response(status_code=await add_note(request.path_params["title"]))


async def post_copy(request: Request) -> Response:
    task = BackgroundTask(add_note, f"copy of {request.path_params['title']}")
    return Response(status_code=202, background=task)


async def get_notes(_: Request) -> Response:
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


routes = [
    Route("/notes/{title}", post_note, methods=["POST"]),
    Route("/notes/{title}/copy", post_copy, methods=["POST"]),
    Route("/notes", get_notes),
]
app = Starlette(
    routes=routes, lifespan=database_lifespan(connect, create_tables=metadata)
)
add_starlette_http_db_session_middleware(app)
