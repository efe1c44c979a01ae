"""A cron job: queue all unprocessed tasks for the worker."""

import asyncio
import sys
from itertools import groupby
from operator import itemgetter

from context_async_sqlalchemy import retry_on_transient_error
from examples.sqlmodel_tasks import services
from examples.sqlmodel_tasks.database import connect
from examples.sqlmodel_tasks.services import TaskKey
from examples.worker.batches import in_batches

user_of = itemgetter(0)


@retry_on_transient_error(attempts=5)
async def queue(tasks: list[TaskKey]) -> None:
    for user_id, of_user in groupby(sorted(tasks), key=user_of):
        await services.queue_tasks(user_id, [task_id for _, task_id in of_user])


async def main() -> int:
    async with connect:
        return await in_batches(queue)


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main()) else 0)
