"""What a request can do with its session and its transactions, in Starlette.

What an endpoint leaves open is committed before a response below 400 starts, and rolled back
otherwise.
"""

import asyncio
import os
from contextlib import suppress
from functools import partial
from typing import Literal, TypeAlias, get_args

from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

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
from context_async_sqlalchemy.starlette_utils import (
    add_starlette_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///workflows.db")
)


def setup_app() -> Starlette:
    app = Starlette(
        routes=routes,
        lifespan=database_lifespan(connect, create_tables=Base.metadata),
    )
    add_starlette_http_db_session_middleware(app)
    return app


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "workflow_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


async def notes(_: Request) -> JSONResponse:
    """Answer with the stored notes."""
    session = await db_session(connect)
    return JSONResponse(
        list(await session.scalars(select(Note.text).order_by(Note.id)))
    )


async def simple_usage(_: Request) -> JSONResponse:
    """Two functions use the same session, in the same transaction."""
    session = await db_session(connect)
    session.add(Note(text="by the handler"))
    await write("by a function that it calls")
    return JSONResponse(None)


async def write(text: str) -> None:
    session = await db_session(connect)
    await session.execute(insert(Note).values(text=text))


async def atomic(_: Request) -> JSONResponse:
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


async def atomic_after_open_transaction(
    _: Request, mode: CurrentTransaction, block: str
) -> JSONResponse:
    """A block begins while a transaction is open; the answer is whether one is open after it."""
    session = await db_session(connect)
    await write("before the block")
    with suppress(ValueError):
        async with atomic_db_session(connect, mode):
            await write("in the block")
            if block == "failing":
                raise ValueError
    return JSONResponse(session.in_transaction())


async def early_commit(_: Request) -> JSONResponse:
    """What is committed stays, even though the request fails later."""
    await write("before the commit")
    await commit_db_session(connect)
    await write("after the commit")
    raise RuntimeError("the request fails")


async def early_rollback(_: Request) -> JSONResponse:
    """The request goes on after a rollback, in a new transaction."""
    await write("before the rollback")
    await rollback_db_session(connect)
    await write("after the rollback")
    return JSONResponse(None)


async def early_close(_: Request) -> JSONResponse:
    """Closing returns the connection, as before slow work; answer whether the session is new."""
    session = await db_session(connect)
    await write("committed before the close")
    await commit_db_session(connect)
    await write("not committed before the close")
    await close_db_session(connect)
    await write("after the close")
    return JSONResponse(await db_session(connect) is not session)


async def concurrent_queries(_: Request) -> JSONResponse:
    """Each call has its own context and connection, and is committed at its end."""
    await asyncio.gather(
        run_in_new_ctx(write, "one"), run_in_new_ctx(write, "another")
    )
    return JSONResponse(None)


async def sessions_outside_the_context(_: Request) -> JSONResponse:
    """These sessions are outside the request: its failure does not undo what they commit."""
    async with new_non_ctx_session(connect) as session:
        session.add(Note(text="committed by hand"))
        await session.commit()
        session.add(Note(text="not committed"))
        await session.flush()
    async with new_non_ctx_atomic_session(connect) as session:
        session.add(Note(text="committed at the end of the block"))
    raise RuntimeError("the request fails")


async def rollback_by_exception(_: Request) -> JSONResponse:
    """A request that raises stores nothing."""
    await write("before the exception")
    raise RuntimeError("the request fails")


async def rollback_by_status_code(_: Request) -> JSONResponse:
    """A request answered with an error stores nothing."""
    await write("before the answer")
    return JSONResponse(None, status_code=409)


routes = [
    Route("/notes", notes),
    Route("/simple_usage", simple_usage, methods=["POST"]),
    Route("/atomic", atomic, methods=["POST"]),
    *(
        Route(
            f"/atomic_after_open_transaction/{mode}/{block}",
            partial(atomic_after_open_transaction, mode=mode, block=block),
            methods=["POST"],
        )
        for mode in get_args(CurrentTransaction)
        for block in ("passing", "failing")
    ),
    Route("/early_commit", early_commit, methods=["POST"]),
    Route("/early_rollback", early_rollback, methods=["POST"]),
    Route("/early_close", early_close, methods=["POST"]),
    Route("/concurrent_queries", concurrent_queries, methods=["POST"]),
    Route(
        "/sessions_outside_the_context",
        sessions_outside_the_context,
        methods=["POST"],
    ),
    Route("/rollback_by_exception", rollback_by_exception, methods=["POST"]),
    Route(
        "/rollback_by_status_code", rollback_by_status_code, methods=["POST"]
    ),
]

app = setup_app()
