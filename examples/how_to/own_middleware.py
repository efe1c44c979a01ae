"""Custom commit rules for a request, and a unit of work where there is no request."""

import os
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import NamedTuple

from fastapi import FastAPI, HTTPException, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    commit_all_sessions,
    db_session,
    get_db_session_from_context,
    init_db_session_ctx,
    reset_db_session_ctx,
    rollback_all_sessions,
)
from context_async_sqlalchemy.asgi_types import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///stock.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "stocked_article"

    name: Mapped[str] = mapped_column(primary_key=True)
    stock: Mapped[int]


class DryRunMiddleware:
    """Answer a request with the header `X-Dry-Run`, and undo its work.

    Args:
        app: The ASGI application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["type"] != "http" or b"x-dry-run" not in dict(
            scope["headers"]
        ):
            await self.app(scope, receive, send)
            return

        async def undo_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                session = get_db_session_from_context(connect)
                if session is not None:
                    await (
                        session.flush()
                    )  # anything the database rejects fails here too
                await rollback_all_sessions()
            await send(message)

        await self.app(scope, receive, undo_and_send)


def is_kept(status: int) -> bool:
    return status < 400 or status == 402


async def refuse_shortage(session: AsyncSession) -> None:
    if await session.scalar(select(Article).where(Article.stock < 0)):
        raise HTTPException(409, "not in stock")


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
app.add_middleware(DryRunMiddleware)
add_fastapi_http_db_session_middleware(
    app, before_commit=refuse_shortage, commit_on=is_kept
)


async def change(name: str, by: int) -> int:
    session = await db_session(connect)
    article = await session.get(Article, name, with_for_update=True)
    if article is None:
        article = Article(name=name, stock=0)
        session.add(article)
    article.stock += by
    return article.stock


@app.post("/articles/{name}/{by}")
async def post_change(name: str, by: int) -> int:
    return await change(name, by)


@app.post("/unpaid/{name}/{by}")
async def post_unpaid_change(name: str, by: int, response: Response) -> int:
    response.status_code = 402
    return await change(name, by)


class Reply(NamedTuple):
    """A handler's answer: a code, as in gRPC, and a number."""

    code: str
    stock: int


Handler = Callable[[str, int], Awaitable[Reply]]


def unit_of_work(handler: Handler) -> Handler:
    """Commit what a handler does if it answers "OK", and undo it otherwise."""

    @wraps(handler)
    async def handle(name: str, by: int) -> Reply:
        token = init_db_session_ctx(force=True)
        try:
            reply = await handler(name, by)
            if reply.code == "OK":
                await commit_all_sessions()
            else:
                await rollback_all_sessions()
            return reply
        finally:
            await reset_db_session_ctx(token)

    return handle


@unit_of_work
async def take(name: str, number: int) -> Reply:
    stock = await change(name, -number)
    return Reply("OK" if stock >= 0 else "FAILED_PRECONDITION", stock)
