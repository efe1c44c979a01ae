"""What a request can do with its session and its transactions, without a framework.

What a workflow leaves open is committed before a response below 400 starts, and rolled back
otherwise.
"""

import asyncio
import json
import os
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///workflows.db")
)


def setup_app() -> ASGIApp:
    return ASGIHTTPDBSessionMiddleware(application)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await live(receive, send)
    elif scope["type"] == "http":
        await respond(scope, send)


async def live(receive: Receive, send: Send) -> None:
    """Create the tables at startup; close the connections at shutdown.

    Follows https://asgi.readthedocs.io/en/latest/specs/lifespan.html.
    """
    async with AsyncExitStack() as stack:
        await receive()
        try:
            await stack.enter_async_context(connect)
            await create_tables()
        except Exception:
            await send(
                {
                    "type": "lifespan.startup.failed",
                    "message": traceback.format_exc(),
                }
            )
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def respond(scope: Scope, send: Send) -> None:
    """Look up the workflow of a request, and answer with what it returns."""
    status, workflow = routes.get(
        (scope["method"], scope["path"]), (404, not_found)
    )
    body = json.dumps(await workflow()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    await send(
        {"type": "http.response.start", "status": status, "headers": headers}
    )
    await send({"type": "http.response.body", "body": body})


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "workflow_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


async def create_tables() -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.create_all)


async def notes() -> list[str]:
    """Return the stored notes."""
    session = await db_session(connect)
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


async def simple_usage() -> None:
    """Two functions use the same session, in the same transaction."""
    session = await db_session(connect)
    session.add(Note(text="by the handler"))
    await write("by a function that it calls")


async def write(text: str) -> None:
    session = await db_session(connect)
    await session.execute(insert(Note).values(text=text))


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


async def atomic_after_open_transaction(
    mode: CurrentTransaction, block: str
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


async def early_commit() -> None:
    """What is committed stays, even though the request fails later."""
    await write("before the commit")
    await commit_db_session(connect)
    await write("after the commit")
    raise RuntimeError("the request fails")


async def early_rollback() -> None:
    """The request goes on after a rollback, in a new transaction."""
    await write("before the rollback")
    await rollback_db_session(connect)
    await write("after the rollback")


async def early_close() -> bool:
    """Closing returns the connection, as before slow work; return whether the session is new."""
    session = await db_session(connect)
    await write("committed before the close")
    await commit_db_session(connect)
    await write("not committed before the close")
    await close_db_session(connect)
    await write("after the close")
    return await db_session(connect) is not session


async def concurrent_queries() -> None:
    """Each call has its own context and connection, and is committed at its end."""
    await asyncio.gather(
        run_in_new_ctx(write, "one"), run_in_new_ctx(write, "another")
    )


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


async def rollback_by_exception() -> None:
    """A request that raises stores nothing."""
    await write("before the exception")
    raise RuntimeError("the request fails")


async def rollback_by_status_code() -> None:
    """A request answered with an error stores nothing: its route says 409."""
    await write("before the answer")


async def not_found() -> str:
    return "not found"


Workflow: TypeAlias = Callable[[], Awaitable[Any]]

routes: dict[tuple[str, str], tuple[int, Workflow]] = {
    ("GET", "/notes"): (200, notes),
    ("POST", "/simple_usage"): (200, simple_usage),
    ("POST", "/atomic"): (200, atomic),
    **{
        ("POST", f"/atomic_after_open_transaction/{mode}/{block}"): (
            200,
            partial(atomic_after_open_transaction, mode, block),
        )
        for mode in get_args(CurrentTransaction)
        for block in ("passing", "failing")
    },
    ("POST", "/early_commit"): (200, early_commit),
    ("POST", "/early_rollback"): (200, early_rollback),
    ("POST", "/early_close"): (200, early_close),
    ("POST", "/concurrent_queries"): (200, concurrent_queries),
    ("POST", "/sessions_outside_the_context"): (
        200,
        sessions_outside_the_context,
    ),
    ("POST", "/rollback_by_exception"): (200, rollback_by_exception),
    ("POST", "/rollback_by_status_code"): (409, rollback_by_status_code),
}

app = setup_app()
