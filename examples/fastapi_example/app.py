"""What a request can do with its session and its transactions, in FastAPI.

What an endpoint leaves open is committed before a response below 400 starts, and rolled back
otherwise.
"""

import asyncio
import os
from contextlib import suppress
from typing import Literal, TypeAlias

from fastapi import APIRouter, FastAPI
from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///workflows.db")
)
router = APIRouter()


def setup_app() -> FastAPI:
    app = FastAPI(
        lifespan=database_lifespan(connect, create_tables=Base.metadata)
    )
    add_fastapi_http_db_session_middleware(app)
    app.include_router(router)
    return app


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "workflow_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@router.get("/notes")
async def notes() -> list[str]:
    """Return the stored notes."""
    session = await db_session(connect)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


@router.post("/simple_usage")
async def simple_usage() -> None:
    """Two functions use the same session, in the same transaction."""
    session = await db_session(connect)
    session.add(Note(text="by the handler"))
    await write("by a function that it calls")


async def write(text: str) -> None:
    session = await db_session(connect)
    await session.execute(insert(Note).values(text=text))


@router.post("/atomic")
async def atomic() -> None:
    """A block is settled at its end, whatever the request does."""
    with suppress(ValueError):
        async with atomic_db_session(connect):
            await write("in a block that fails")
            raise ValueError
    async with atomic_db_session(connect):
        await write("in a block")
    await write("after the blocks")
    raise RuntimeError("the request fails")


CurrentTransaction: TypeAlias = Literal[
    "commit", "rollback", "append", "raise", "savepoint"
]


@router.post("/atomic_after_open_transaction/{mode}/{block}")
async def atomic_after_open_transaction(
    mode: CurrentTransaction, block: Literal["passing", "failing"]
) -> bool:
    """A block begins in a transaction; return whether one is open after it."""
    session = await db_session(connect)
    await write("before the block")
    with suppress(ValueError):
        async with atomic_db_session(connect, mode):
            await write("in the block")
            if block == "failing":
                raise ValueError
    return session.in_transaction()


@router.post("/early_commit")
async def early_commit() -> None:
    """What is committed stays, even though the request fails later."""
    await write("before the commit")
    await commit_db_session(connect)
    await write("after the commit")
    raise RuntimeError("the request fails")


@router.post("/early_rollback")
async def early_rollback() -> None:
    """The request goes on after a rollback, in a new transaction."""
    await write("before the rollback")
    await rollback_db_session(connect)
    await write("after the rollback")


@router.post("/early_close")
async def early_close() -> bool:
    """Closing returns the connection, as before slow work; return whether the session is new."""
    session = await db_session(connect)
    await write("committed before the close")
    await commit_db_session(connect)
    await write("not committed before the close")
    await close_db_session(connect)
    await write("after the close")
    return await db_session(connect) is not session


@router.post("/concurrent_queries")
async def concurrent_queries() -> None:
    """Each call has its own context and connection, and is committed at its end."""
    await asyncio.gather(
        run_in_new_ctx(write, "one"), run_in_new_ctx(write, "another")
    )


@router.post("/sessions_outside_the_context")
async def sessions_outside_the_context() -> None:
    """These sessions are outside the request: its failure does not undo what they commit."""
    async with new_non_ctx_session(connect) as session:
        session.add(Note(text="committed by hand"))
        await session.commit()
        session.add(Note(text="not committed"))
        await session.flush()
    async with new_non_ctx_atomic_session(connect) as session:
        session.add(Note(text="committed at the end of the block"))
    raise RuntimeError("the request fails")


@router.post("/rollback_by_exception")
async def rollback_by_exception() -> None:
    """A request that raises stores nothing."""
    await write("before the exception")
    raise RuntimeError("the request fails")


@router.post("/rollback_by_status_code", status_code=409)
async def rollback_by_status_code() -> None:
    """A request answered with an error stores nothing."""
    await write("before the answer")


app = setup_app()
