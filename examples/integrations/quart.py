"""Notes, in Quart."""

import os
from collections.abc import AsyncGenerator

from quart import Quart, Response
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

app = Quart(__name__)
app.asgi_app = ASGIHTTPDBSessionMiddleware(app.asgi_app)


@app.while_serving
async def lifespan() -> AsyncGenerator[None]:
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(
                text("CREATE TABLE IF NOT EXISTS note (title TEXT)")
            )
        yield


@app.post("/notes/<title>")
async def post_note(title: str) -> Response:
    return Response(status=await add_note(title))


@app.post("/notes/<title>/copy")
async def post_copy(title: str) -> Response:
    app.add_background_task(run_in_new_ctx, add_note, f"copy of {title}")
    return Response(status=202)


@app.get("/notes")
async def get_notes() -> Response:
    return Response(read_notes())


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
