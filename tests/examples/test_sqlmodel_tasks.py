"""The application of `examples/sqlmodel_tasks`, as its clients see it."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest
import pytest_asyncio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from tests.helpers.connections import connections_out
from tests.helpers.postgres import free_port
from tests.helpers.programs import ROOT, until
from tests.helpers.servers import running_module
from tests.helpers.serving import http_client
from tests.helpers.tasks_example import TasksExample, load_anew, sign_up, tasks_example


@pytest_asyncio.fixture
async def example(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[TasksExample]:
    """Return the example, on each database."""
    async with tasks_example(monkeypatch, url) as example:
        yield example


@pytest_asyncio.fixture
async def client(example: TasksExample) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client of the example that is logged in as Ann."""
    async with http_client(example.app) as client:
        client.headers = httpx.Headers(await sign_up(client, "ann"))
        yield client
        await until(lambda: connections_out(example.connect) == 0)


only_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


# Users


async def test_a_task_of_another_user_is_not_there(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    tea = (await client.post("/tasks", json={"title": "tea", "category": "shopping"})).json()
    bob = await sign_up(client, "bob")
    path = f"/tasks/{tea['id']}"
    for response in (
        await client.get(path, headers=bob),
        await client.patch(path, headers=bob, json={"title": "mine"}),
        await client.delete(path, headers=bob),
        await client.post("/tasks/process", headers=bob, json=[tea["id"]]),
        await client.post("/tasks/queue", headers=bob, json=[tea["id"]]),
    ):
        assert response.status_code == 404
    for path_of_list in ("/tasks", "/tasks?pending=true"):
        assert (await client.get(path_of_list, headers=bob)).json() == []
        assert (await client.get(path_of_list)).json() == [tea]

    # Nor is it in his way, nor its category.
    rows = [{"title": "tea", "category": "shopping"}]
    report = await client.post("/tasks/import", headers=bob, json=rows)
    assert report.json() == {"imported": 1, "failed": []}
    [his] = (await client.get("/tasks", headers=bob)).json()
    assert his["category_id"] != tea["category_id"]
    # All or none of them.
    both = await client.post("/tasks/process", headers=bob, json=[his["id"], tea["id"]])
    assert both.status_code == 404
    state = "SELECT title, completed, processed, deliveries_left FROM task"
    assert await example.rows(state) == [("tea", False, False, 0)] * 2


async def test_who_has_no_valid_token_is_refused(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    secret = example.module("sqlmodel_tasks.settings").settings.jwt_secret.get_secret_value()
    [ann] = (str(user) for user in await example.rows("SELECT id FROM user_account"))
    later = datetime.now(UTC) + timedelta(hours=1)
    good = {"sub": ann, "exp": later}

    async def status(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return (await client.get("/tasks", headers=headers)).status_code

    assert await status(jwt.encode(good, secret, "HS256")) == 200
    issued = jwt.decode(client.headers["authorization"].split()[1], secret, ["HS256"])
    assert issued["exp"] <= later.timestamp()
    for token in (
        "nonsense",
        jwt.encode(good, "another secret, as long as it ought to be", "HS256"),
        jwt.encode(good, "", "none"),
        jwt.encode(good | {"exp": datetime.now(UTC) - timedelta(seconds=1)}, secret, "HS256"),
        jwt.encode({"sub": ann}, secret, "HS256"),
        jwt.encode(good | {"sub": str(uuid4())}, secret, "HS256"),
        jwt.encode(good | {"sub": "ann"}, secret, "HS256"),
    ):
        assert await status(token) == 401
    del client.headers["Authorization"]
    refused = await client.get("/tasks")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")


# Transactions


async def test_what_was_answered_is_committed(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    tasks = "SELECT title, completed FROM task"
    created = await client.post("/tasks", json={"title": "tea"})
    assert created.status_code == 201
    assert await example.rows(tasks) == [("tea", False)]
    path = f"/tasks/{created.json()['id']}"
    assert (await client.patch(path, json={"completed": True})).json()["completed"]
    assert await example.rows(tasks) == [("tea", True)]
    assert (await client.get("/tasks?pending=true")).json() == []
    assert (await client.patch(path, json={"title": None})).status_code == 422
    assert (await client.patch(path, json={"title": "milk"})).json()["completed"]
    assert await example.rows(tasks) == [("milk", True)]
    assert (await client.get(path)).json()["title"] == "milk"
    assert (await client.delete(path)).status_code == 204
    assert await example.rows(tasks) == []
    assert (await client.get(path)).status_code == 404


async def test_a_task_and_its_category_are_created_together_or_not_at_all(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    assert (await client.post("/tasks", json={"title": "tea"})).status_code == 201
    again = await client.post("/tasks", json={"title": "tea", "category": "shopping"})
    assert again.status_code == 409
    assert await example.rows("SELECT name FROM category") == []
    for title in "milk", "bread":
        task = await client.post("/tasks", json={"title": title, "category": "shopping"})
        assert task.status_code == 201
    task = await client.post("/tasks", json={"title": "letter", "category": "errands"})
    assert task.status_code == 201
    of_tasks = "SELECT name FROM task LEFT JOIN category c ON c.id = category_id ORDER BY task.id"
    assert await example.rows(of_tasks) == [None, "shopping", "shopping", "errands"]
    assert await example.rows("SELECT name FROM category ORDER BY id") == ["shopping", "errands"]


async def test_a_bad_row_of_an_import_fails_alone(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    await client.post("/tasks", json={"title": "tea"})
    rows: list[dict[str, Any]] = [
        {"title": "milk", "category": "shopping"},
        {"title": "tea", "category": "never made"},
        {"title": ""},
        {"category": "shopping"},
        {"title": "a\0b"},
        {"title": "bread", "category": "shopping"},
    ]
    report = (await client.post("/tasks/import", json=rows)).json()
    assert report["imported"] == 2
    assert [failed["row"] for failed in report["failed"]] == [1, 2, 3, 4]
    assert report["failed"][0]["error"] == "there already"
    assert await example.rows("SELECT title FROM task ORDER BY id") == ["tea", "milk", "bread"]
    assert await example.rows("SELECT name FROM category") == ["shopping"]


async def test_tasks_are_read_by_the_page_in_the_order_they_were_made(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    ids = await create(client, "tea", "milk", "bread")
    # PostgreSQL writes the row anew, behind the others.
    await example.execute("UPDATE task SET processed = true WHERE title = 'tea'")
    for parameters, page in (
        ({}, ids),
        ({"skip": 1}, ids[1:]),
        ({"limit": 2}, ids[:2]),
        ({"skip": 1, "limit": 1, "pending": True}, ids[1:2]),
        ({"skip": 3}, []),
    ):
        tasks = (await client.get("/tasks", params=parameters)).json()
        assert [task["id"] for task in tasks] == page


@only_postgresql
async def test_a_lost_race_is_tried_again(
    client: httpx.AsyncClient, example: TasksExample, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stamina")
    async with example.outside.connection() as connection:
        await connection.execute(text("LOCK TABLE category IN SHARE MODE"))
        row, *rows = ({"title": title, "category": "shopping"} for title in ("tea", "ham", "jam"))
        requests = (client.post("/tasks", json=row), client.post("/tasks/import", json=rows))
        responses = [asyncio.create_task(request) for request in requests]
        # Both have found no such category.
        await until(lambda: wait_for_a_lock(example, "INSERT INTO category", 2))
    created, imported = await asyncio.gather(*responses)
    assert created.status_code == 201
    assert imported.json() == {"imported": 2, "failed": []}
    assert await example.rows("SELECT name FROM category") == ["shopping"]
    assert await example.rows("SELECT count(DISTINCT category_id) FROM task") == [1]
    assert await example.rows("SELECT count(*) FROM task") == [3]
    assert any(record.name == "stamina" for record in caplog.records)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_on_sqlite_a_request_waits_for_the_one_before_it_and_loses_no_race(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stamina")
    tasks = [{"title": str(number), "category": "shopping"} for number in range(20)]
    responses = await asyncio.gather(*(client.post("/tasks", json=task) for task in tasks))
    assert {response.status_code for response in responses} == {201}
    assert not any(record.name == "stamina" for record in caplog.records)


async def wait_for_a_lock(example: TasksExample, statement: str, number: int) -> bool:
    """Return whether so many transactions wait to execute a statement that begins like this."""
    waiting = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        f" AND wait_event_type = 'Lock' AND query LIKE '{statement}%'"
    )
    return len(await example.rows(waiting)) == number


async def create(client: httpx.AsyncClient, *titles: str) -> list[int]:
    return [(await client.post("/tasks", json={"title": t})).json()["id"] for t in titles]


async def test_background_work_is_done_and_committed(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    tea, milk, _ = await create(client, "tea", "milk", "bread")
    assert (await client.post("/tasks/process", json=[tea, milk])).status_code == 202
    processed = "SELECT title FROM task WHERE processed ORDER BY id"
    await until(lambda: rows_are(example, processed, ["tea", "milk"]))


async def rows_are(example: TasksExample, query: str, expected: list[Any]) -> bool:
    return await example.rows(query) == expected


@only_postgresql
async def test_background_work_that_fails_fails_alone_and_holds_nobody_up(
    client: httpx.AsyncClient, example: TasksExample, caplog: pytest.LogCaptureFixture
) -> None:
    ids = await create(client, "tea", "milk", "bread")
    await example.execute("ALTER TABLE task ADD CHECK (NOT processed OR title <> 'milk')")
    async with example.held("NEW.processed"):
        # The response comes while the work waits.
        assert (await client.post("/tasks/process", json=ids)).status_code == 202
        await until(example.waiting)
        assert await example.rows("SELECT title FROM task WHERE processed") == []
    processed = "SELECT title FROM task WHERE processed ORDER BY id"
    await until(lambda: rows_are(example, processed, ["tea", "bread"]))
    assert f"Task {ids[1]} was not processed" in caplog.text


@only_postgresql
async def test_background_work_that_lost_a_race_is_tried_again(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    ids = await create(client, "tea")
    async with example.outside.connection() as connection:
        await connection.execute(text("UPDATE task SET completed = true"))
        assert (await client.post("/tasks/process", json=ids)).status_code == 202
        await until(lambda: wait_for_a_lock(example, "UPDATE task", 1))
    state = "SELECT completed, processed FROM task"
    await until(lambda: rows_are(example, state, [(True, True)]))


# The database


@only_postgresql
async def test_the_application_says_that_its_database_is_away(
    client: httpx.AsyncClient, example: TasksExample
) -> None:
    health = await client.get("/health/database")
    assert (health.status_code, health.json()["pool"]["checked_in"]) == (200, 1)
    host = example.connect.host
    await example.connect.change_host(f"127.0.0.1:{free_port()}")
    assert (await client.get("/health/database")).status_code == 503
    assert (await client.get("/tasks")).status_code == 503
    await example.connect.change_host(host)
    assert (await client.get("/tasks")).status_code == 200


@only_postgresql
async def test_the_application_waits_for_its_database_before_it_starts(
    example: TasksExample, caplog: pytest.LogCaptureFixture
) -> None:
    host = example.connect.host
    await example.connect.change_host(f"127.0.0.1:{free_port()}")
    async with http_client(example.app) as client:
        request = asyncio.create_task(client.get("/health/database"))
        await until(lambda: "ConnectionRefusedError" in caplog.text)
        await example.connect.change_host(host)
        assert (await request).status_code == 200


@pytest.mark.parametrize("path", ["/tasks/2147483648", "/tasks?skip=-1", "/tasks?limit=101"])
async def test_a_number_that_no_row_can_have_is_refused(
    client: httpx.AsyncClient, path: str
) -> None:
    assert (await client.get(path)).status_code == 422


async def test_a_character_that_no_text_can_have_is_refused(client: httpx.AsyncClient) -> None:
    [tea] = await create(client, "tea")
    for response in (
        await client.post("/users/%00"),
        await client.post("/tasks", json={"title": "\0"}),
        await client.post("/tasks", json={"title": "milk", "category": "\0"}),
        await client.patch(f"/tasks/{tea}", json={"title": "\0"}),
    ):
        assert response.status_code == 422


async def test_what_is_too_long_is_refused(client: httpx.AsyncClient) -> None:
    for response in (
        await client.post(f"/users/{'x' * 101}"),
        await client.post("/tasks", json={"title": "x" * 201}),
        await client.post("/tasks", json={"title": "tea", "category": "x" * 101}),
        await client.post("/tasks/import", json=[{}] * 1001),
        await client.post("/tasks/process", json=[1] * 101),
        await client.post("/tasks/queue", json=[1] * 101),
    ):
        assert response.status_code == 422


async def test_the_migrations_make_the_tables_of_the_models(
    example: TasksExample,
) -> None:
    metadata = example.module("sqlmodel_tasks.models").Base.metadata
    options = {"compare_server_default": True}
    async with example.outside.connection() as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync, opts=options), metadata)
        )
    # The database of the tests on PostgreSQL has other tables, too.
    others = {"item", "seat", "purse", "ledger"}
    assert [d for d in differences if not (d[0] == "remove_table" and d[1].name in others)] == []
    assert len(metadata.tables) == 3


# Settings, and the command


async def run_command(*arguments: str, **environment: str) -> tuple[int | None, str]:
    """Run the command with these variables alone; return its status and what it wrote to stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "examples.sqlmodel_tasks", *arguments),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environment,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    return process.returncode, errors.decode()


async def test_a_production_setting_that_is_missing_is_an_error_at_start_up() -> None:
    url = "postgresql://app:hunter2@127.0.0.1/tasks"
    status, errors = await run_command(ENVIRONMENT="production", DATABASE_URL=url)
    assert status == 1
    assert "1 validation error for ProductionSettings\njwt_secret\n  Field required" in errors
    assert "hunter2" not in errors
    status, errors = await run_command(ENVIRONMENT="production", JWT_SECRET="too short")
    assert status == 1
    assert "database_url\n  Field required" in errors
    assert "jwt_secret\n  Value should have at least 32 items" in errors
    assert "too short" not in errors
    status, errors = await run_command(ENVIRONMENT="prod")
    assert status == 1
    assert "ENVIRONMENT must be development or production, not 'prod'" in errors


async def test_without_a_word_it_is_production_and_no_secret_has_a_default() -> None:
    status, errors = await run_command()
    assert status == 1
    assert "2 validation errors for ProductionSettings\njwt_secret\n  Field required" in errors
    assert "database_url\n  Field required" in errors
    assert "ENVIRONMENT=development has defaults" in errors


def test_the_secret_of_development_is_known_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JWT_SECRET", raising=False)
    known = set()
    for _ in range(2):
        load_anew(monkeypatch)
        from examples.sqlmodel_tasks.settings import settings

        known.add(settings.jwt_secret.get_secret_value())
    assert len(known) == 2
    assert min(map(len, known)) >= 32


def test_production_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"JWT_SECRET": "x" * 32, "DATABASE_URL": "postgresql://app:hunter2@h/tasks"}
    for variable in "DATABASE_ECHO", "DATABASE_POOL_SIZE":
        monkeypatch.delenv(variable, raising=False)
    load_anew(monkeypatch, ENVIRONMENT="production", DATABASE_MAX_OVERFLOW="7", **secrets)
    from examples.sqlmodel_tasks.settings import settings

    assert (settings.database_echo, settings.database_pool_size) == (False, 5)
    assert settings.database_max_overflow == 7
    assert "hunter2" not in repr(settings)
    assert "x" * 32 not in repr(settings)


async def test_the_engine_has_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"POOL_SIZE": 3, "MAX_OVERFLOW": 4, "POOL_RECYCLE": 60, "ECHO": 1}
    variables = {f"DATABASE_{name}": str(value) for name, value in settings.items()}
    load_anew(monkeypatch, DATABASE_URL="postgresql://app@127.0.0.1/tasks", **variables)
    from examples.sqlmodel_tasks.database import connect

    engine = await connect.create_engine()
    pool: Any = engine.pool
    assert (pool.size(), pool._max_overflow, pool._recycle) == (3, 4, 60)
    assert engine.echo
    await engine.dispose()


async def test_the_command_migrates_and_serves(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with tasks_example(monkeypatch, url) as example:
        await example.execute("DROP TABLE task", "DROP TABLE category", "DROP TABLE user_account")
        await example.execute("DELETE FROM alembic_version")
        command = "examples.sqlmodel_tasks --port {port}"
        # `tasks_example` has set the rest of its environment.
        with running_module(command, tmp_path / "log", DATABASE_URL=url) as port:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                ann = await sign_up(client, "ann")
                created = await client.post("/tasks", headers=ann, json={"title": "tea"})
                assert created.status_code == 201
        assert await example.rows("SELECT title FROM task") == ["tea"]
