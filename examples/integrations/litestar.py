"""Notes, in Litestar."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from litestar import Litestar, Response, get, post
from litestar.background_tasks import BackgroundTask
from litestar.logging import LoggingConfig
from litestar.params import Parameter
from litestar.response import Stream
from sqlalchemy import text

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_db_session_ctx,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///notes.db")
)


@asynccontextmanager
async def lifespan(_: Litestar) -> AsyncGenerator[None]:
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(
                text("CREATE TABLE IF NOT EXISTS note (title TEXT)")
            )
        yield


Title = Annotated[str, Parameter()]


@post("/notes/{title:str}")
async def post_note(title: Title) -> Response[None]:
    return Response(None, status_code=await add_note(title))


@post("/notes/{title:str}/copy", status_code=202)
async def post_copy(title: Title) -> Response[None]:
    return Response(
        None, background=BackgroundTask(add_note, f"copy of {title}")
    )


@get("/notes")
async def get_notes() -> Stream:
    return Stream(read_notes())


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


app = Litestar(
    [post_note, post_copy, get_notes],
    lifespan=[lifespan],
    middleware=[ASGIHTTPDBSessionMiddleware],
    logging_config=LoggingConfig(
        log_exceptions="always", configure_root_logger=False
    ),
)
