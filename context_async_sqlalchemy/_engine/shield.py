"""Work that a cancellation does not tear apart, and work that is not waited for."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from context_async_sqlalchemy._engine.log import logger

T = TypeVar("T")


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in a task of its own and wait for its end, however often the caller is cancelled.

    asyncio cancels once; an anyio cancel scope cancels again at every await. A cancellation is
    raised once the work has ended, and an error of the work is then logged.
    """
    task = asyncio.create_task(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as cancelled:
            cancellation = cancelled
    if cancellation is None:
        return task.result()
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("Database work failed after its task was cancelled", exc_info=error)
    raise cancellation


def keep(task: asyncio.Task[T], among: set[asyncio.Task[T]]) -> asyncio.Task[T]:
    """Keep a task among others until it ends: a loop has only weak references to its tasks."""
    among.add(task)
    task.add_done_callback(among.discard)
    return task


async def result_within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in a task of its own; after `seconds`, cancel it and do not wait for its end.

    It raises `TimeoutError` then. Drivers take seconds to close a connection to a silent server.
    """
    task = asyncio.create_task(work)
    keep(task, _running)
    task.add_done_callback(_hear)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    finally:
        task.cancel()
    if not done:
        raise TimeoutError
    return task.result()


def _hear(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # or else asyncio would report that nobody has asked for it


_running: set[asyncio.Task[Any]] = set()
