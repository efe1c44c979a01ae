"""The jobs of `examples/worker`, run on what the application has committed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.helpers.postgres import free_port
from tests.helpers.programs import until
from tests.helpers.serving import http_client
from tests.helpers.tasks_example import TasksExample, sign_up, tasks_example


@pytest_asyncio.fixture
async def example(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[TasksExample]:
    """Return the example, on each database, with a user and 250 tasks."""
    async with tasks_example(monkeypatch, url) as example:
        user = "11111111111111111111111111111111"
        await example.execute(
            f"INSERT INTO user_account VALUES ('{user}', 'eve')",
            "INSERT INTO task (user_id, title, completed, processed, deliveries_left)"
            " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 250)"
            f" SELECT '{user}', 't' || i, false, false, 0 FROM n",
        )
        yield example


only_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


async def processed(example: TasksExample) -> Sequence[Any]:
    return await example.rows("SELECT title FROM task WHERE processed ORDER BY id")


async def processed_count(example: TasksExample) -> int:
    return len(await processed(example))


async def end(process: asyncio.subprocess.Process) -> int | None:
    """Wait until a process has ended, and return its exit status."""
    async with asyncio.timeout(30):
        await process.communicate()
    return process.returncode


# The queue worker


async def test_the_worker_does_what_a_client_was_told_will_be_done(example: TasksExample) -> None:
    async with http_client(example.app) as client:
        ann, bob = await sign_up(client, "ann"), await sign_up(client, "bob")
        await queue(client, ann, "tea", "milk")
        await queue(client, bob, "tea")
        assert (await client.post("/tasks", headers=bob, json={"title": "ham"})).status_code == 201
    async with example.program("worker.queue") as worker:
        await until(lambda: is_processed(example, "tea", "milk", "tea"))
        worker.send_signal(signal.SIGTERM)
        assert await end(worker) == 0
    assert await is_processed(example, "tea", "milk", "tea")
    assert await example.rows("SELECT DISTINCT deliveries_left FROM task") == [0]


async def queue(client: httpx.AsyncClient, user: dict[str, str], *titles: str) -> None:
    for title in titles:
        task = await client.post("/tasks", headers=user, json={"title": title})
        queued = await client.post("/tasks/queue", headers=user, json=[task.json()["id"]])
        assert queued.status_code == 202


async def is_processed(example: TasksExample, *titles: str) -> bool:
    return await processed(example) == list(titles)


@only_postgresql
async def test_a_worker_that_is_killed_loses_no_task(example: TasksExample) -> None:
    await example.execute("UPDATE task SET deliveries_left = 5 WHERE id <= 3")
    async with example.held("NEW.processed"):
        async with example.program("worker.queue") as worker:
            await until(example.waiting)
            worker.kill()
            assert await end(worker) == -signal.SIGKILL
        assert await processed(example) == []
    async with example.program("worker.queue"):
        await until(lambda: is_processed(example, "t1", "t2", "t3"))


@only_postgresql
async def test_a_worker_that_is_stopped_finishes_what_it_has_begun(example: TasksExample) -> None:
    await example.execute("UPDATE task SET deliveries_left = 5 WHERE id <= 1")
    async with example.program("worker.queue") as worker:
        async with example.held("NEW.processed"):
            await until(example.waiting)
            worker.send_signal(signal.SIGTERM)
        assert await end(worker) == 0
    assert await processed(example) == ["t1"]


@only_postgresql
async def test_a_worker_whose_database_stays_away_ends_with_an_error(example: TasksExample) -> None:
    url = f"postgresql://postgres@127.0.0.1:{free_port()}/tasks"
    async with example.program("worker.queue", DATABASE_URL=url) as worker:
        assert await end(worker) == 1


@only_postgresql
async def test_a_worker_outlives_the_loss_of_its_connections(example: TasksExample) -> None:
    async with example.program("worker.queue") as worker:
        await example.execute("UPDATE task SET deliveries_left = 5 WHERE id = 1")
        await until(lambda: is_processed(example, "t1"))
        await example.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            "UPDATE task SET deliveries_left = 5 WHERE id = 2",
        )
        await until(lambda: is_processed(example, "t1", "t2"))
        assert worker.returncode is None


@only_postgresql
async def test_a_task_that_always_fails_is_given_up(
    example: TasksExample, caplog: pytest.LogCaptureFixture
) -> None:
    await example.execute(
        "ALTER TABLE task ADD CHECK (NOT processed OR title <> 't2')",
        "UPDATE task SET deliveries_left = 5 WHERE id <= 3",
    )
    worker = example.module("worker.queue")
    async with example.connect:
        assert [await worker.deliver() for _ in range(6)] == [3, 1, 1, 1, 1, 0]
    assert await processed(example) == ["t1", "t3"]
    assert caplog.text.count("Exception found while executing function") == 5


# The cron job


async def test_the_nightly_job_leaves_the_rest_to_the_worker(example: TasksExample) -> None:
    async with http_client(example.app) as client:
        await client.post("/tasks", headers=await sign_up(client, "ann"), json={"title": "tea"})
    await example.execute("UPDATE task SET processed = true WHERE id <= 120")
    async with example.program("worker.nightly") as job:
        assert await end(job) == 0
    queued = "SELECT min(id), max(id), count(*) FROM task WHERE deliveries_left = 5"
    assert await example.rows(queued) == [(121, 251, 131)]


# The script


async def test_the_script_processes_everything(example: TasksExample) -> None:
    async with example.program("worker.process_all") as script:
        output, errors = await script.communicate()
    assert (script.returncode, errors) == (0, b"")
    assert b"100%" in output
    assert await processed_count(example) == 250


@only_postgresql
async def test_a_script_that_was_killed_goes_on_where_it_was(example: TasksExample) -> None:
    async with (
        example.held("NEW.processed AND NEW.title = 't150'"),
        example.program("worker.process_all") as script,
    ):
        await until(example.waiting)
        script.kill()
        assert await end(script) == -signal.SIGKILL
    # The batch that was committed, and nothing of the one that was not.
    versions = "SELECT id, CAST(xmin AS text) FROM task WHERE id <= 100 AND processed ORDER BY id"
    before = await example.rows(versions)
    assert len(before) == await processed_count(example) == 100
    async with example.program("worker.process_all") as script:
        assert await end(script) == 0
    assert await processed_count(example) == 250
    assert await example.rows(versions) == before


@only_postgresql
async def test_a_batch_that_fails_is_lost_alone(example: TasksExample) -> None:
    await example.execute("ALTER TABLE task ADD CHECK (NOT processed OR title <> 't150')")
    async with example.program("worker.process_all") as script:
        _, errors = await script.communicate()
    assert script.returncode == 1
    assert b"Nothing was done for the 100 tasks up to 200" in errors
    assert await example.rows("SELECT min(id), max(id) FROM task WHERE NOT processed") == [
        (101, 200)
    ]
