"""Tools of FastMCP, each call of which is a unit of work."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastmcp import FastMCP
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///facts.db")
)


class Base(DeclarativeBase):
    pass


class Fact(Base):
    __tablename__ = "works_with_fact"

    text: Mapped[str] = mapped_column(primary_key=True)


class UnitOfWork(Middleware):
    """Commits what a tool has written if it returns, else rolls it back."""

    async def on_request(
        self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]
    ) -> Any:
        async with new_db_session_ctx():
            return await call_next(context)


mcp = FastMCP("facts")
mcp.add_middleware(UnitOfWork())


@mcp.tool
async def learn(facts: list[str]) -> str:
    """Learn some facts: all of them, or none."""
    session = await db_session(connect)
    for fact in facts:
        if not fact:
            raise ValueError("a fact is empty")
        session.add(Fact(text=fact))
        await session.flush()
    return f"{len(facts)} learned"


mcp_app = mcp.http_app(path="/mcp")
database = database_lifespan(connect, create_tables=Base.metadata)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with database(app), mcp_app.lifespan(app):
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/", mcp_app)
add_fastapi_http_db_session_middleware(app)
