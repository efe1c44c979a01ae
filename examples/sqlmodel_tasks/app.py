"""The endpoints. None of them commits: a response below 400 means that the work is stored."""

import logging
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import (
    BackgroundTasks,
    FastAPI,
    HTTPException,
    Path,
    Query,
    Request,
)
from fastapi.responses import JSONResponse
from pydantic import Field
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy import db_session, retry_on_transient_error
from context_async_sqlalchemy.fastapi_utils import (
    add_database_exception_handlers,
    add_fastapi_http_db_session_middleware,
    database_health,
    database_lifespan,
)
from examples.sqlmodel_tasks import services
from examples.sqlmodel_tasks.auth import CurrentUser, make_token
from examples.sqlmodel_tasks.database import connect
from examples.sqlmodel_tasks.models import (
    ImportReport,
    Task,
    TaskCreate,
    TaskRead,
    TaskUpdate,
    Text,
    User,
)
from examples.sqlmodel_tasks.repositories import TaskRepository

TaskId = Annotated[int, Field(ge=1, lt=2**31)]
TaskIds = Annotated[list[TaskId], Field(max_length=100)]
Rows = Annotated[list[dict[str, Any]], Field(max_length=1000)]

app = FastAPI(title="Tasks", lifespan=database_lifespan(connect, wait=True))
add_fastapi_http_db_session_middleware(app, attempts=5)
add_database_exception_handlers(app)
app.add_api_route("/health/database", database_health(connect))


@app.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "there already"}, status_code=409)


@app.post("/users/{name}", status_code=201)
async def sign_up(name: Annotated[Text, Path(max_length=100)]) -> str:
    """Create a user and return a token. A real service would ask for a password."""
    session = await db_session(connect)
    user = User(name=name)
    session.add(user)
    return make_token(user.id)


@app.post("/tasks", status_code=201, response_model=TaskRead)
async def create(new: TaskCreate, user: CurrentUser) -> Task:
    return await services.create_task(user.id, new)


@app.get("/tasks", response_model=list[TaskRead])
async def read_all(
    user: CurrentUser,
    pending: bool = False,
    skip: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=0, le=100)] = 100,
) -> Sequence[Task]:
    tasks = TaskRepository(user.id)
    if pending:
        return await tasks.get_pending(skip, limit)
    return await tasks.get_multi(skip=skip, limit=limit)


@app.post("/tasks/import")
async def import_rows(rows: Rows, user: CurrentUser) -> ImportReport:
    return await services.import_tasks(user.id, rows)


@app.post("/tasks/process", status_code=202)
async def process(
    task_ids: TaskIds, user: CurrentUser, background: BackgroundTasks
) -> None:
    """Process tasks in this process, after the response."""
    await require(user, task_ids)
    background.add_task(process_in_background, user.id, task_ids)


@app.post("/tasks/queue", status_code=202)
async def queue(task_ids: TaskIds, user: CurrentUser) -> None:
    """Queue tasks for the worker of `examples/worker`."""
    await require(user, task_ids)
    await services.queue_tasks(user.id, task_ids)


@app.get("/tasks/{task_id}", response_model=TaskRead)
async def read(task_id: TaskId, user: CurrentUser) -> Task:
    return found(await TaskRepository(user.id).get(task_id))


@app.patch("/tasks/{task_id}", response_model=TaskRead)
async def update(
    task_id: TaskId, changes: TaskUpdate, user: CurrentUser
) -> Task:
    values = changes.model_dump(exclude_unset=True)
    return found(await TaskRepository(user.id).update(task_id, values))


@app.delete("/tasks/{task_id}", status_code=204)
async def delete(task_id: TaskId, user: CurrentUser) -> None:
    if not await TaskRepository(user.id).delete(task_id):
        raise HTTPException(404)


def found(task: Task | None) -> Task:
    if task is None:
        raise HTTPException(404)
    return task


async def require(user: User, task_ids: list[int]) -> None:
    tasks = await TaskRepository(user.id).get_many(task_ids)
    if len(tasks) < len(set(task_ids)):
        raise HTTPException(404)


process_task = retry_on_transient_error(attempts=5)(services.process_task)


async def process_in_background(user_id: UUID, task_ids: list[int]) -> None:
    """Process each task in its own context, so that a lost race repeats only that task.

    Tasks not yet done when the process ends are lost: use the worker for those that must not be.
    """
    for task_id in task_ids:
        try:
            await process_task(user_id, task_id)
        except Exception:
            logging.exception("Task %s was not processed", task_id)
