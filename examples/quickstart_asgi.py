from sqlalchemy import text

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send

connect = DBConnect.from_url("sqlite:///notes.db")


async def lifespan(receive: Receive, send: Send) -> None:
    await receive()  # lifespan.startup
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(text("CREATE TABLE IF NOT EXISTS note (body TEXT UNIQUE)"))
    await send({"type": "lifespan.startup.complete"})
    await receive()  # lifespan.shutdown
    await connect.close()
    await send({"type": "lifespan.shutdown.complete"})


async def add_note(body: str) -> None:
    session = await db_session(connect)
    await session.execute(text("INSERT INTO note VALUES (:body)"), {"body": body})


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    is_note = scope["method"] == "POST" and scope["path"].startswith("/notes/")
    if is_note:
        await add_note(scope["path"].removeprefix("/notes/"))
    await send({"type": "http.response.start", "status": 201 if is_note else 404})
    await send({"type": "http.response.body"})


app = ASGIHTTPDBSessionMiddleware(application)
