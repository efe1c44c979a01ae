"""Notes, in Starlette."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import text
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware

connect = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite:///notes.db"))


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[None]:
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(text("CREATE TABLE IF NOT EXISTS note (title TEXT)"))
        yield


async def post_note(request: Request) -> Response:
    return Response(status_code=await add_note(request.path_params["title"]))


async def post_copy(request: Request) -> Response:
    task = BackgroundTask(add_note, f"copy of {request.path_params['title']}")
    return Response(status_code=202, background=task)


async def get_notes(_: Request) -> Response:
    return StreamingResponse(read_notes())


async def add_note(title: str) -> int:
    """Add a note; return the status of the response: 409, for a duplicate, rolls it back."""
    session = await db_session(connect)
    await session.execute(text("INSERT INTO note VALUES (:title)"), {"title": title})
    titles = (await session.scalars(text("SELECT title FROM note"))).all()
    return 201 if titles.count(title) == 1 else 409


async def read_notes() -> AsyncGenerator[bytes]:
    session = await db_session(connect)
    for title in await session.scalars(text("SELECT title FROM note")):
        yield f"{title}\n".encode()


routes = [
    Route("/notes/{title}", post_note, methods=["POST"]),
    Route("/notes/{title}/copy", post_copy, methods=["POST"]),
    Route("/notes", get_notes),
]
app = Starlette(routes=routes, lifespan=lifespan)
add_starlette_http_db_session_middleware(app)
