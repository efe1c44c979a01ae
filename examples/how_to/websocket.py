"""A WebSocket: each message is a unit of work."""

import logging
import os

from fastapi import FastAPI, WebSocket
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import database_lifespan

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///notes.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "how_to_note"

    body: Mapped[str] = mapped_column(primary_key=True)


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))


LONGEST = 10_000  # characters


async def add_notes(message: str) -> None:
    if len(message) > LONGEST:
        raise ValueError("a message is too long")
    session = await db_session(connect)
    for line in message.split("\n"):
        if not line:
            raise ValueError("a note is empty")
        session.add(Note(body=line))


@app.websocket("/notes")
async def take_notes(websocket: WebSocket) -> None:
    await websocket.accept()
    async for message in websocket.iter_text():
        try:
            async with new_db_session_ctx():
                await add_notes(message)
            answer = "stored"
        except IntegrityError:
            answer = "there already"
        except Exception:
            logging.exception("A message failed")
            answer = "failed"
        await websocket.send_text(answer)
