"""The life of a request, printed: what the application, the database and the response do, in order.

Runs on an SQLite file, or on the server of `DATABASE_URL`: `python -m examples.life_of_a_request`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.types import ASGIApp, Receive, Scope, Send

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from tests.helpers.serving import http_client


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "life_of_a_request"

    body: Mapped[str] = mapped_column(primary_key=True)


def make_app(connect: DBConnect) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)
    app.add_middleware(ResponsePrinter)  # the one added last is the outermost

    async def add_note(body: str) -> None:
        session = await db_session(connect)
        print("  a session")
        await session.execute(insert(Note).values(body=body))

    async def index(body: str) -> None:
        print("  the background task begins")
        await add_note(f"{body}, indexed")

    @app.post("/notes/{body}", status_code=201)
    async def add(body: str, background: BackgroundTasks) -> None:
        print("  the handler begins")
        await add_note(body)
        background.add_task(index, body)
        print("  the handler has returned")

    @app.post("/notes/{body}/refused")
    async def refuse(body: str) -> None:
        await add_note(body)
        raise HTTPException(409)

    @app.post("/notes/{body}/streamed")
    async def stream(body: str) -> StreamingResponse:
        async def parts() -> AsyncGenerator[str]:
            yield "a part"
            await add_note(f"{body}, streamed")
            yield "another part"

        await add_note(body)
        return StreamingResponse(parts())

    return app


class ResponsePrinter:
    """Prints what the session middleware, which is inside this one, sends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async def print_and_send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                print("  response start:", message["status"])
            elif message.get("body"):
                print("  response body")
            if message["type"] == "http.response.body" and not message.get(
                "more_body"
            ):
                print("  response end")
            await send(message)

        if scope["type"] == "http":
            print(scope["method"], scope["path"])
        await self.app(scope, receive, print_and_send)


def print_what_happens_on(engine: AsyncEngine) -> None:
    """Print, further to the right, what the engine does from now on."""
    pool, engine_events = engine.sync_engine.pool, engine.sync_engine
    for target, name, line in (
        (pool, "checkout", "connection out of the pool"),
        (engine_events, "begin", "BEGIN"),
        (engine_events, "after_execute", "INSERT"),
        (engine_events, "commit", "COMMIT"),
        (engine_events, "rollback", "ROLLBACK"),
        (pool, "checkin", "connection back in the pool"),
    ):
        event.listen(target, name, lambda *_, line=line: print(f"      {line}"))


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        default = f"sqlite:///{Path(directory) / 'notes.db'}"
        async with DBConnect.from_url(
            os.environ.get("DATABASE_URL", default)
        ) as connect:
            await create_table(connect)
            for path in ("milk", "bread/refused", "tea/streamed"):
                # A server for each: it stops when the background task has ended.
                async with http_client(
                    make_app(connect), log_level="critical"
                ) as client:
                    await client.post(f"/notes/{path}")


async def create_table(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        connection = await (await db_session(connect)).connection()
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    assert connect.engine is not None
    print_what_happens_on(connect.engine)


if __name__ == "__main__":
    asyncio.run(main())
