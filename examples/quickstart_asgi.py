from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_non_ctx_atomic_session,
)
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    body: Mapped[str] = mapped_column(primary_key=True)


connect = DBConnect.from_url("sqlite:///notes.db")


async def lifespan(receive: Receive, send: Send) -> None:
    await receive()  # lifespan.startup
    async with connect:
        async with new_non_ctx_atomic_session(connect) as session:
            connection = await session.connection()
            await connection.run_sync(Base.metadata.create_all)
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
    await send({"type": "lifespan.shutdown.complete"})


async def add_note(body: str) -> None:
    session = await db_session(connect)
    session.add(Note(body=body))


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    status = 404
    if scope["method"] == "POST" and scope["path"].startswith("/notes/"):
        await add_note(scope["path"].removeprefix("/notes/"))
        status = 201
    await send({"type": "http.response.start", "status": status})
    await send({"type": "http.response.body"})


app = ASGIHTTPDBSessionMiddleware(application)
