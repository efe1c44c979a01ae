"""An MCP server in a FastAPI application: each call of a tool is a unit of work."""

import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Annotated, ParamSpec, TypeVar

from fastapi import FastAPI
from mcp.server.mcpserver import MCPServer
from pydantic import Field
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import database_lifespan

P = ParamSpec("P")
T = TypeVar("T")

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///mcp.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "mcp_note"

    body: Mapped[str] = mapped_column(primary_key=True)


mcp = MCPServer("notes", log_level="WARNING")


def tool(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Make a function a tool: committed if it returns, else rolled back."""

    @mcp.tool()
    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        async with new_db_session_ctx():
            return await function(*args, **kwargs)

    return call


@tool
async def take_notes(notes: Annotated[list[str], Field(max_length=100)]) -> str:
    """Keep some notes: all of them, or none."""
    session = await db_session(connect)
    for note in notes:
        if not note:
            raise ValueError("a note is empty")
        session.add(Note(body=note))
        await session.flush()
    return f"{len(notes)} kept"


mcp_app = mcp.streamable_http_app()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    tables = database_lifespan(connect, create_tables=Base.metadata)
    async with tables(app), mcp.session_manager.run():
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/", mcp_app)  # last: it takes every path, and answers at /mcp
