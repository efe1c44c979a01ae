"""A job that is added in a request inherits its context: APScheduler, and taskiq."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from fastapi import FastAPI
from sqlalchemy import insert
from taskiq import InMemoryBroker

from context_async_sqlalchemy import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    db_session,
    on_commit,
    run_in_new_ctx,
)
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.programs import until
from tests.helpers.serving import http_client


class Jobs:
    """An application whose requests add jobs; a job adds an item, when it is let go."""

    def __init__(self, connect: DBConnect) -> None:
        self.connect = connect
        self.let_go = asyncio.Event()
        self.errors: asyncio.Queue[Exception | None] = asyncio.Queue()

    async def add_item(self, name: str) -> None:
        session = await db_session(self.connect)
        await session.execute(insert(Item).values(name=name))
        if name == "bad":
            raise RuntimeError

    async def run(self, name: str, is_apart: bool) -> None:
        await self.let_go.wait()
        try:
            await (run_in_new_ctx(self.add_item, name) if is_apart else self.add_item(name))
        except Exception as error:
            self.errors.put_nowait(error)
        else:
            self.errors.put_nowait(None)


@pytest_asyncio.fixture
async def jobs(connect: DBConnect) -> Jobs:
    return Jobs(connect)


LATER = datetime(2100, 1, 1, tzinfo=UTC)
Add = Callable[..., Awaitable[object]]


@pytest_asyncio.fixture(params=["APScheduler", "taskiq"])
async def add(request: pytest.FixtureRequest, jobs: Jobs) -> AsyncGenerator[Add]:
    """Return what adds a job, which is run at once."""
    if request.param == "taskiq":
        broker = InMemoryBroker()

        @broker.task
        async def run(name: str, is_apart: bool) -> None:
            await jobs.run(name, is_apart)

        yield run.kiq
        await broker.wait_all()
        return
    scheduler = AsyncIOScheduler()
    scheduler.start()

    async def add_job(*args: Any) -> None:
        scheduler.add_job(jobs.run, args=args)

    yield add_job
    scheduler.shutdown()


async def post(jobs: Jobs, add: Add, *args: Any, status: int = 200) -> int:
    """Return the status of a request that adds an item, and a job."""
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.post("/", status_code=status)
    async def add_one() -> None:
        await jobs.add_item("of the request")
        await add(*args)

    async with http_client(app) as client:
        return (await client.post("/")).status_code


async def test_a_job_that_outlives_its_request_gets_an_error_that_says_what_to_do(
    jobs: Jobs, add: Add, database: Database
) -> None:
    assert await post(jobs, add, "of the job", False) == 200
    jobs.let_go.set()
    error = await jobs.errors.get()
    assert isinstance(error, ContextClosedError)
    assert "was started in it" in str(error)
    assert "run_in_new_ctx" in str(error)
    assert await database.names() == ["of the request"]


@pytest.mark.parametrize("is_over", [True, False])
async def test_a_job_in_a_context_of_its_own_is_apart_from_the_request(
    jobs: Jobs, add: Add, database: Database, is_over: bool
) -> None:
    if not is_over:
        jobs.let_go.set()
    assert await post(jobs, add, "of the job", True) == 200
    jobs.let_go.set()
    assert await jobs.errors.get() is None
    assert sorted(await database.names()) == ["of the job", "of the request"]


async def test_a_job_in_a_context_of_its_own_that_fails_is_rolled_back(
    jobs: Jobs, add: Add, database: Database
) -> None:
    assert await post(jobs, add, "bad", True) == 200
    jobs.let_go.set()
    assert isinstance(await jobs.errors.get(), RuntimeError)
    assert await database.names() == ["of the request"]


async def test_a_job_that_has_none_is_in_the_transaction_of_a_request_that_goes_on(
    jobs: Jobs, add: Add, database: Database
) -> None:
    async def add_and_wait(*args: Any) -> None:
        await add(*args)
        assert await jobs.errors.get() is None

    jobs.let_go.set()
    assert await post(jobs, add_and_wait, "of the job", False, status=409) == 409
    assert await database.names() == []


async def test_a_job_that_is_added_on_commit_finds_what_the_request_has_stored(
    jobs: Jobs, add: Add, database: Database
) -> None:
    async def add_on_commit(*args: Any) -> None:
        on_commit(jobs.connect, partial(add, *args))

    jobs.let_go.set()
    assert await post(jobs, add_on_commit, "of no job", True, status=409) == 409
    assert await post(jobs, add_on_commit, "of the job", True) == 200
    assert await jobs.errors.get() is None
    assert await database.names() == ["of the request", "of the job"]
    assert jobs.errors.empty()


async def test_apscheduler_is_given_run_in_new_ctx_as_the_function(
    jobs: Jobs, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = AsyncIOScheduler()
    scheduler.start()

    async def add(*names: str) -> None:
        for name in names:
            scheduler.add_job(run_in_new_ctx, args=[jobs.add_item, name])

    assert await post(jobs, add, "bad", "good") == 200
    await until(lambda: "raised an exception" in caplog.text)
    await until(lambda: is_stored(database, "good"))
    scheduler.shutdown()
    assert sorted(await database.names()) == ["good", "of the request"]


async def is_stored(database: Database, name: str) -> bool:
    return name in await database.names()


async def test_a_job_of_apscheduler_runs_in_the_context_of_who_woke_the_scheduler_last(
    jobs: Jobs, database: Database
) -> None:
    # Thus every job has to open a context, whoever has added it.
    scheduler = AsyncIOScheduler()
    scheduler.start()
    scheduler.add_job(jobs.run, "interval", seconds=0.02, args=["by itself", False])
    jobs.let_go.set()
    assert type(await jobs.errors.get()) is ContextNotInitiatedError

    async def add(*args: Any) -> None:
        scheduler.add_job(jobs.run, "date", run_date=LATER, args=args)

    assert await post(jobs, add, "of the request", False) == 200
    while not isinstance(await jobs.errors.get(), ContextClosedError):
        pass
    scheduler.shutdown()
    assert await database.names() == ["of the request"]
