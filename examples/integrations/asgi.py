"""Notes, in pure ASGI."""

import os
from collections.abc import AsyncGenerator

from sqlalchemy import text

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///notes.db")
)


async def live(receive: Receive, send: Send) -> None:
    await receive()  # lifespan.startup
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(
                text("CREATE TABLE IF NOT EXISTS note (title TEXT)")
            )
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
    await send({"type": "lifespan.shutdown.complete"})


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await live(receive, send)
        return
    match scope["method"], scope["path"].split("/"):
        case "POST", [_, "notes", title]:
            await respond(send, await add_note(title))
        case "POST", [_, "notes", title, "copy"]:
            await respond(send, 202)
            await add_note(f"copy of {title}")
        case "GET", [_, "notes"]:
            await send({"type": "http.response.start", "status": 200})
            async for line in read_notes():
                await send(
                    {
                        "type": "http.response.body",
                        "body": line,
                        "more_body": True,
                    }
                )
            await send({"type": "http.response.body"})
        case _:
            await respond(send, 404)


async def respond(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0")]
    await send(
        {"type": "http.response.start", "status": status, "headers": headers}
    )
    await send({"type": "http.response.body"})


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
