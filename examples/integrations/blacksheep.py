"""Notes, in BlackSheep."""

import asyncio
import os
from collections.abc import AsyncGenerator

from blacksheep import Application, Response, Router, StreamedContent
from sqlalchemy import text

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_db_session_ctx,
    run_in_new_ctx,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///notes.db")
)

application = Application(router=Router())
copies: set[asyncio.Task[int]] = set()


@application.lifespan
async def lifespan(_: Application) -> AsyncGenerator[None]:
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(
                text("CREATE TABLE IF NOT EXISTS note (title TEXT)")
            )
        yield
        await asyncio.gather(*copies, return_exceptions=True)


@application.router.post("/notes/{title}")
async def post_note(title: str) -> Response:
    return Response(await add_note(title))


@application.router.post("/notes/{title}/copy")
async def post_copy(title: str) -> Response:
    task = asyncio.create_task(run_in_new_ctx(add_note, f"copy of {title}"))
    copies.add(task)  # without a reference, it may be garbage-collected
    task.add_done_callback(copies.discard)
    return Response(202)


@application.router.get("/notes")
async def get_notes() -> Response:
    return Response(200, content=StreamedContent(b"text/plain", read_notes))


async def add_note(title: str) -> int:
    """Add a note; return the status: 409, for a duplicate, rolls it back."""
    session = await db_session(connect)
    await session.execute(
        text("INSERT INTO note VALUES (:title)"), {"title": title}
    )
    titles = (await session.scalars(text("SELECT title FROM note"))).all()
    return 201 if titles.count(title) == 1 else 409


async def read_notes() -> AsyncGenerator[bytes]:
    session = await db_session(connect)
    for title in await session.scalars(text("SELECT title FROM note")):
        yield f"{title}\n".encode()


app = ASGIHTTPDBSessionMiddleware(application)
