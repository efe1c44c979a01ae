"""The queue worker: processes queued tasks, again if a worker was killed meanwhile."""

import asyncio
import signal
from contextlib import suppress
from uuid import UUID

from taskiq import InMemoryBroker

from context_async_sqlalchemy import retry_on_transient_error
from examples.sqlmodel_tasks import services
from examples.sqlmodel_tasks.database import connect

broker = InMemoryBroker()
POLL_SECONDS = 1


@broker.task
@retry_on_transient_error(attempts=5)
async def process(user_id: UUID, task_id: int) -> None:
    await services.process_task(user_id, task_id)


@retry_on_transient_error(attempts=5)
async def take() -> list[services.TaskKey]:
    return await services.take_queued_tasks(limit=5)


async def deliver() -> int:
    """Send messages for queued tasks, wait until they are done, and return how many there were."""
    tasks = await take()
    for user_id, task_id in tasks:
        await process.kiq(user_id, task_id)
    await broker.wait_all()
    return len(tasks)


async def work() -> None:
    """Deliver queued tasks until SIGINT or SIGTERM, then finish those in progress."""
    stopped = asyncio.Event()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # taskiq swallows a cancellation
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await broker.startup()
    async with connect:
        while not stopped.is_set():
            if not await deliver():
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), POLL_SECONDS)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(work())
