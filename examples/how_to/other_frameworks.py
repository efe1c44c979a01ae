"""One small application, served by Litestar, by Quart and by BlackSheep."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

import blacksheep
import litestar
import quart
from litestar.background_tasks import BackgroundTask
from litestar.logging import LoggingConfig
from litestar.params import Parameter
from litestar.response import Stream
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    db_session,
    new_db_session_ctx,
    run_in_new_ctx,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///titles.db")
connect = DBConnect.from_url(DATABASE_URL, os.environ.get("DATABASE_PASSWORD"))


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "titled_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


async def database(*_: object) -> AsyncGenerator[None]:
    async with connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(Base.metadata.create_all)
        yield


async def add_note(title: str) -> int:
    """Add a note; return the status of the answer, of which 409 undoes it."""
    session = await db_session(connect)
    session.add(Note(title=title))
    await session.flush()
    count = select(func.count()).select_from(Note).filter_by(title=title)
    return 201 if await session.scalar(count) == 1 else 409


async def add_words(title: str) -> AsyncGenerator[bytes]:
    for word in title.split("-"):
        await add_note(word)
        yield word.encode() + b"\n"


async def add_copy(title: str) -> None:
    await add_note(f"copy of {title}")


# Litestar

Title = Annotated[str, Parameter()]


@litestar.post("/notes/{title:str}")
async def litestar_note(title: Title) -> litestar.Response[None]:
    return litestar.Response(None, status_code=await add_note(title))


@litestar.post("/notes/{title:str}/words")
async def litestar_words(title: Title) -> Stream:
    return Stream(add_words(title))


@litestar.post("/notes/{title:str}/copy", status_code=202)
async def litestar_copy(title: Title) -> litestar.Response[None]:
    return litestar.Response(None, background=BackgroundTask(add_copy, title))


litestar_app = litestar.Litestar(
    [litestar_note, litestar_words, litestar_copy],
    lifespan=[asynccontextmanager(database)],
    middleware=[ASGIHTTPDBSessionMiddleware],
    logging_config=LoggingConfig(log_exceptions="always", configure_root_logger=False),
)

# Quart

quart_app = quart.Quart(__name__)
quart_app.while_serving(database)
quart_app.asgi_app = ASGIHTTPDBSessionMiddleware(quart_app.asgi_app)


@quart_app.post("/notes/<title>")
async def quart_note(title: str) -> quart.Response:
    return quart.Response(status=await add_note(title))


@quart_app.post("/notes/<title>/words")
async def quart_words(title: str) -> quart.Response:
    return quart.Response(add_words(title))


@quart_app.post("/notes/<title>/copy")
async def quart_copy(title: str) -> quart.Response:
    quart_app.add_background_task(run_in_new_ctx, add_copy, title)
    return quart.Response(status=202)


# BlackSheep

application = blacksheep.Application(router=blacksheep.Router())
application.lifespan(database)


@application.router.post("/notes/{title}")
async def blacksheep_note(title: str) -> blacksheep.Response:
    return blacksheep.Response(await add_note(title))


@application.router.post("/notes/{title}/words")
async def blacksheep_words(title: str) -> blacksheep.Response:
    async def words() -> AsyncGenerator[bytes]:
        async for word in add_words(title):
            yield word

    return blacksheep.Response(200, content=blacksheep.StreamedContent(b"text/plain", words))


blacksheep_app = ASGIHTTPDBSessionMiddleware(application)
