"""A chat: each message is a unit of work, broadcast once it is committed."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, WebSocket, WebSocketDisconnect, status
from fastapi.responses import FileResponse
from pydantic import BaseModel, StringConstraints, ValidationError
from sqlalchemy import CheckConstraint, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    on_commit,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from examples.websocket_chat.rooms import broadcast, deliver, joined

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///chat.db")
)


class Base(DeclarativeBase):
    pass


class Message(Base):
    __tablename__ = "chat_message"
    __table_args__ = (
        CheckConstraint("length(author) BETWEEN 1 AND 40"),
        CheckConstraint("length(body) BETWEEN 1 AND 500"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    room: Mapped[str] = mapped_column(index=True)
    author: Mapped[str]
    body: Mapped[str]

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "author": self.author, "body": self.body}


# JSON and URLs may contain NUL, which PostgreSQL refuses.
WITHOUT_NUL = r"^[^\x00]*$"


class Draft(BaseModel):
    """A message as a client sends it."""

    author: Annotated[
        str, StringConstraints(min_length=1, max_length=40, pattern=WITHOUT_NUL)
    ]
    body: Annotated[
        str,
        StringConstraints(min_length=1, max_length=500, pattern=WITHOUT_NUL),
    ]


LONGEST = 8192  # of a draft as JSON, where a character may take twelve
REFUSED = {
    "error": "A name has 1 to 40 characters, a message 1 to 500, without NUL."
}


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(
    app
)  # for the history; WebSockets pass through it

Room = Annotated[str, Query(min_length=1, max_length=40, pattern=WITHOUT_NUL)]


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("page.html"))


@app.get("/messages")
async def history(room: Room) -> list[dict[str, Any]]:
    session = await db_session(connect)
    newest = (
        select(Message)
        .filter_by(room=room)
        .order_by(Message.id.desc())
        .limit(50)
    )
    return [
        message.as_json()
        for message in reversed((await session.scalars(newest)).all())
    ]


@app.websocket("/chat")
async def chat(websocket: WebSocket, room: Room) -> None:
    if not is_own_page(websocket):
        await websocket.close(status.WS_1008_POLICY_VIOLATION)
        return
    await websocket.accept()
    try:
        with joined(room) as outbox:
            async with asyncio.TaskGroup() as tasks:
                delivery = tasks.create_task(deliver(outbox, websocket))
                async for frame in frames(websocket):
                    # Who does not read the answers is not read from either.
                    await outbox.put(await answer(room, frame))
                delivery.cancel()
    except* (WebSocketDisconnect, TimeoutError):
        logging.info("A client left, or did not read")


def is_own_page(websocket: WebSocket) -> bool:
    """Return whether no page of another site connects: a browser would let it."""
    origin = websocket.headers.get(
        "origin"
    )  # other clients than browsers send none
    return origin is None or origin.partition("://")[
        2
    ] == websocket.headers.get("host")


async def frames(websocket: WebSocket) -> AsyncGenerator[str | bytes]:
    while (message := await websocket.receive())["type"] == "websocket.receive":
        yield message.get("text") or message.get("bytes") or ""


async def answer(room: str, frame: str | bytes) -> dict[str, Any]:
    """Store one message, and return the answer to its sender."""
    if len(frame) > LONGEST:
        return REFUSED
    try:
        draft = Draft.model_validate_json(frame)
    except ValidationError:
        return REFUSED
    try:
        async with new_db_session_ctx():
            await say(room, draft)
    except Exception:
        logging.exception("A message failed")
        return {"error": "Your message could not be stored. Try again."}
    return {"stored": True}


async def say(room: str, draft: Draft) -> None:
    session = await db_session(connect)
    message = Message(room=room, **draft.model_dump())
    session.add(message)
    await session.flush()  # gives the message its id
    on_commit(connect, partial(broadcast, room, message.as_json()))
