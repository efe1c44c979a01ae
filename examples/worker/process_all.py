"""A script with a progress bar; if killed, it resumes where it stopped when run again."""

import asyncio
import sys

from rich.progress import Progress

from context_async_sqlalchemy import retry_on_transient_error, run_in_new_ctx
from examples.sqlmodel_tasks import services
from examples.sqlmodel_tasks.database import connect
from examples.sqlmodel_tasks.services import TaskKey
from examples.worker.batches import in_batches


@retry_on_transient_error(attempts=5)
async def process(tasks: list[TaskKey]) -> None:
    for user_id, task_id in tasks:
        await services.process_task(user_id, task_id)


async def main() -> int:
    async with connect:
        with Progress() as progress:
            total = await run_in_new_ctx(services.count_unprocessed_tasks)
            bar = progress.add_task("Tasks", total=total)
            return await in_batches(
                process, lambda count: progress.advance(bar, count)
            )


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main()) else 0)
