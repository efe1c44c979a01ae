"""Contexts that are not requests: a block, and a call in a task of its own."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NoReturn, ParamSpec, TypeVar, cast

from context_async_sqlalchemy._engine.checks import check_before_commit
from context_async_sqlalchemy._unit.context import open_context
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback, abandon, finish

P = ParamSpec("P")
T = TypeVar("T")


class _NoSession:
    """What the block of a context yields to who takes it for a session."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"There is no {name!r}: this block opens a context, as 'async with "
            "new_db_session_ctx():' does, and yields no session. In it, call "
            "'session = await db_session(connect)'."
        )


NO_SESSION = cast(None, _NoSession())


def new_db_session_ctx(
    before_commit: BeforeCommitCallback | None = None,
) -> AbstractAsyncContextManager[None]:
    """Open a context for a block: committed at its end, rolled back on an exception, always closed.

    Inside another context it is a unit of work of its own; the outer one is restored afterwards.

        async with new_db_session_ctx():
            session = await db_session(connect)
            session.add(User(name="Ann"))

    Args:
        before_commit: Called with each session that is about to be committed. Default None.

    Raises:
        TypeError: If `before_commit` is not callable.
    """
    check_before_commit(before_commit)
    return _block(before_commit)


@asynccontextmanager
async def _block(before_commit: BeforeCommitCallback | None) -> AsyncGenerator[None]:
    context = open_context()
    try:
        yield NO_SESSION
    except BaseException as error:
        await abandon(context, error)
        raise
    else:
        await finish(context, commit=True, before_commit=before_commit)


async def run_in_new_ctx(
    callable_func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call an async function in a context and a task of its own.

    Its work is committed when it returns and rolled back when it raises, independently of the
    caller's. Several calls run concurrently, each on its own connection:

        users, orders = await asyncio.gather(
            run_in_new_ctx(load_users), run_in_new_ctx(load_orders, limit=10)
        )

    Args:
        callable_func: The async function.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        What the function returned.
    """

    async def call() -> T:
        async with new_db_session_ctx():
            return await callable_func(*args, **kwargs)

    return await asyncio.create_task(call())
