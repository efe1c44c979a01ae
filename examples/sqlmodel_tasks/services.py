"""What the application does, for its endpoints and for the jobs of `examples/worker`.

Each function takes its session from the context; the code that opened the context commits.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, func, select

from context_async_sqlalchemy import atomic_db_session, db_session
from examples.sqlmodel_tasks.database import connect
from examples.sqlmodel_tasks.models import (
    FailedRow,
    ImportReport,
    Task,
    TaskCreate,
)
from examples.sqlmodel_tasks.repositories import (
    CategoryRepository,
    TaskRepository,
)

TaskKey: TypeAlias = tuple[UUID, int]  # user id, task id

MAX_DELIVERIES = 5


async def create_task(user_id: UUID, new: TaskCreate) -> Task:
    """Create a task, and its category if it is new: both or neither."""
    task = Task(user_id=user_id, title=new.title)
    if new.category is not None:
        task.category_id = (
            await CategoryRepository(user_id).get_or_create(new.category)
        ).id
    return await TaskRepository(user_id).create(task)


async def import_tasks(
    user_id: UUID, rows: list[dict[str, Any]]
) -> ImportReport:
    """Create tasks in the open transaction; a bad row fails alone."""
    report = ImportReport(imported=0, failed=[])
    for number, row in enumerate(rows):
        try:
            async with atomic_db_session(connect, "savepoint"):
                await create_task(user_id, TaskCreate.model_validate(row))
            report.imported += 1
        except ValidationError as error:
            report.failed.append(
                FailedRow(row=number, error=error.errors()[0]["msg"])
            )
        except IntegrityError:
            report.failed.append(FailedRow(row=number, error="there already"))
    return report


async def process_task(user_id: UUID, task_id: int) -> None:
    """Process a task; harmless if it is already processed, or deleted."""
    task = await TaskRepository(user_id).get(task_id)
    if task is not None:
        task.processed = True  # do the real work here
        task.deliveries_left = 0


async def queue_tasks(user_id: UUID, task_ids: Sequence[int]) -> None:
    """Queue tasks for the worker: once this is committed, a crash does not lose them."""
    for task in await TaskRepository(user_id).get_many(task_ids):
        task.deliveries_left = MAX_DELIVERIES


async def take_queued_tasks(limit: int) -> list[TaskKey]:
    """Take tasks from the queue; each stays queued, for a few deliveries, until it is processed."""
    queued = (
        select(Task)
        .where(Task.deliveries_left > 0)
        .order_by(col(Task.id))
        .limit(limit)
    )
    session = await db_session(connect)
    tasks = (await session.exec(queued)).all()
    for task in tasks:
        task.deliveries_left -= 1
    return _keys(tasks)


async def unprocessed_tasks(after: int, limit: int) -> list[TaskKey]:
    """Return the unprocessed tasks of all users with an id above `after`."""
    rest = select(Task).where(
        col(Task.processed).is_(False), col(Task.id) > after
    )
    session = await db_session(connect)
    return _keys(
        (await session.exec(rest.order_by(col(Task.id)).limit(limit))).all()
    )


async def count_unprocessed_tasks() -> int:
    session = await db_session(connect)
    count = select(func.count()).where(col(Task.processed).is_(False))
    return (await session.exec(count)).one()


def _keys(tasks: Sequence[Task]) -> list[TaskKey]:
    return [(task.user_id, task.id) for task in tasks if task.id is not None]
