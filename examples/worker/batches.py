"""Shared by the jobs: go through the unprocessed tasks, one batch at a time."""

import logging
from collections.abc import Awaitable, Callable

from context_async_sqlalchemy import retry_on_transient_error
from examples.sqlmodel_tasks import services
from examples.sqlmodel_tasks.services import TaskKey

BATCH = 100
next_tasks = retry_on_transient_error(attempts=5)(services.unprocessed_tasks)


async def in_batches(
    work: Callable[[list[TaskKey]], Awaitable[None]],
    done: Callable[[int], None] = lambda _: None,
) -> int:
    """Call `work` for each batch, and `done` with its size; return how many have failed."""
    failed = after = 0
    while tasks := await next_tasks(after, BATCH):
        after = tasks[-1][1]
        try:
            await work(tasks)
        except Exception:
            logging.exception(
                "Nothing was done for the %s tasks up to %s", len(tasks), after
            )
            failed += 1
        else:
            done(len(tasks))
    return failed
