"""The programs of the how-to pages on FastAPI and Starlette, run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import URL

from tests.helpers.database import Database
from tests.helpers.postgres import free_port
from tests.helpers.programs import Outside, load_program, until
from tests.helpers.serving import http_client

# Dependencies


@pytest_asyncio.fixture
async def chores(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client of the program in which Ann is a member, on each database."""
    program = load("dependencies", url)
    async with http_client(program.app) as client:
        client.headers["token"] = "t"
        assert (await client.put("/members/ann")).status_code == 200
        yield client
    with pytest.raises(RuntimeError, match="not initialized"):
        _ = program.database.connect


async def test_the_member_and_the_chore_are_of_one_transaction(
    chores: httpx.AsyncClient, url: str
) -> None:
    assert (await chores.post("/chores/dishes")).json() == 1
    assert (await chores.post("/chores/dishes")).status_code == 500
    assert (await chores.post("/chores/laundry", headers={"token": "x"})).status_code == 401
    assert (await chores.post("/chores/laundry")).json() == 2
    assert await Outside(url).rows("SELECT title, owner FROM chore ORDER BY title") == [
        ("dishes", "ann"),
        ("laundry", "ann"),
    ]
    assert await Outside(url).rows("SELECT visits FROM member") == [2]


async def test_the_report_commits_itself(chores: httpx.AsyncClient, url: str) -> None:
    assert (await chores.post("/chores/dishes")).status_code == 201
    assert (await chores.post("/reports/bob")).json() == 1
    assert await Outside(url).rows("SELECT owner FROM chore") == ["bob"]


# Deadlines


async def test_reports_have_deadlines(
    postgresql: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load_program(monkeypatch, "deadlines", DATABASE_URL=postgresql)
    async with http_client(program.app) as client:
        late, long = await asyncio.gather(
            client.get("/reports/30"), client.get("/long-reports/2.2")
        )
        assert (late.status_code, late.json()) == (504, {"detail": "Gateway Timeout"})
        assert (long.status_code, long.json()) == (200, "done")
        assert program.connect.pool_status().checked_in == 2  # no connection was lost
    assert program.connect.engine is None


# Health and errors


async def test_the_application_is_healthy_and_says_when_the_pool_is_full(
    postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load_program(monkeypatch, "health_and_errors", DATABASE_URL=postgresql)
    async with http_client(program.app) as client:
        assert (await client.get("/answer")).json() == 42
        health = await client.get("/health")
        assert (health.status_code, health.json()["healthy"]) == (200, True)
        assert health.json()["pool"]["checked_in"] == 1
        sessions = [await program.connect.create_session() for _ in range(15)]
        for session in sessions:
            await session.connection()
        full, health = await asyncio.gather(client.get("/answer"), client.get("/health"))
        assert (full.status_code, full.headers["retry-after"]) == (503, "5")
        assert health.json()["healthy"]
        assert health.json()["pool"]["checked_out"] == health.json()["pool"]["capacity"] == 15
        for session in sessions:
            await session.close()
    assert program.connect.engine is None


async def test_the_application_says_that_its_database_is_away(
    database_url: URL, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = database_url.render_as_string(hide_password=False)
    program = load_program(monkeypatch, "health_and_errors", DATABASE_URL=url)
    async with http_client(program.app) as client:
        assert (await client.get("/answer")).status_code == 200
        await program.connect.change_host(f"127.0.0.1:{free_port()}")
        answer = await client.get("/answer")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        health = await client.get("/health")
        assert (health.status_code, health.json()["healthy"]) == (503, False)


async def test_the_application_does_not_start_without_its_database(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"postgresql://app:hunter2@127.0.0.1:{free_port()}/shop"
    program = load_program(monkeypatch, "health_and_errors", DATABASE_URL=url)

    async def no_pause(_: float) -> None: ...

    monkeypatch.setattr("context_async_sqlalchemy._engine.readiness.asyncio.sleep", no_pause)
    with (
        caplog.at_level(logging.WARNING, "context_async_sqlalchemy"),
        pytest.raises(ConnectionRefusedError),
    ):
        async with program.app.router.lifespan_context(program.app):
            pytest.fail("it has started")
    assert caplog.text.count("is not ready") == 5
    assert "hunter2" not in caplog.text


# Sync endpoints


async def test_plain_functions_share_the_session_of_their_request(
    url: str, load: Callable[[str, str], Any]
) -> None:
    program = load("sync_endpoints", url)
    async with http_client(program.app) as client:
        assert (await client.put("/shelves")).status_code == 200
        assert (await client.post("/shelves/top/Emma")).json() == ["Emma"]
        assert (await client.post("/shelves/top/Emma")).status_code == 500
        assert (await client.post("/shelves/top/Ulysses")).json() == ["Emma", "Ulysses"]
        assert (await client.post("/orders/top/Dune")).status_code == 202
        await until(lambda: Outside(url).rows("SELECT 1 FROM book WHERE title = 'Dune'"))
        assert (await client.get("/books")).json() == 3
