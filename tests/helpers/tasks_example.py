"""The tasks of `examples/sqlmodel_tasks`, loaded for a database, and programs on it."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import text

from tests.helpers.connections import connections_out
from tests.helpers.programs import ROOT, Outside

ALEMBIC = Config(ROOT / "examples/sqlmodel_tasks/alembic.ini")
PACKAGES = ("examples.sqlmodel_tasks", "examples.worker")
MODELS = "examples.sqlmodel_tasks.models"  # loaded once: their metadata has each table once


class TasksExample:
    """The example, with its tables in a database."""

    def __init__(self, url: str) -> None:
        self.outside = Outside(url)
        self.connect = self.module("sqlmodel_tasks.database").connect
        self.app = self.module("sqlmodel_tasks.app").app

    def module(self, name: str) -> Any:
        """Return one of its modules."""
        return importlib.import_module(f"examples.{name}")

    async def rows(self, query: str) -> Sequence[Any]:
        """Return what is committed."""
        return await self.outside.rows(query)

    async def execute(self, *statements: str) -> None:
        """Run statements, and commit them."""
        async with self.outside.connection() as connection:
            for statement in statements:
                await connection.execute(text(statement))

    @asynccontextmanager
    async def program(
        self, module: str, **environment: str
    ) -> AsyncGenerator[asyncio.subprocess.Process]:
        """Run a program of the example as a process, killed at the end of the block."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-m", f"examples.{module}"),
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": self.outside.url} | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    @asynccontextmanager
    async def held(self, condition: str) -> AsyncGenerator[None]:
        """Let updates of tasks wait until the end of the block; PostgreSQL only."""
        await self.execute(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END'",
            "CREATE TRIGGER hold BEFORE UPDATE ON task FOR EACH ROW"
            f" WHEN ({condition}) EXECUTE FUNCTION hold()",
        )
        async with self.outside.connection() as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(1)"))
            yield
        await self.execute("DROP FUNCTION hold CASCADE")

    async def waiting(self) -> int:
        """Return how many updates wait."""
        [count] = await self.rows(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock' AND wait_event = 'advisory'"
        )
        return int(count)


@asynccontextmanager
async def tasks_example(monkeypatch: pytest.MonkeyPatch, url: str) -> AsyncGenerator[TasksExample]:
    """Load the example for a database, whose tables are made, and dropped, by its migrations."""
    load_anew(monkeypatch, DATABASE_URL=url, DATABASE_ECHO="false")
    await asyncio.to_thread(command.upgrade, ALEMBIC, "head")
    example = TasksExample(url)
    try:
        yield example
        assert connections_out(example.connect) == 0
        assert example.connect.engine is None, "the example has not closed its connect"
    finally:
        await asyncio.to_thread(command.downgrade, ALEMBIC, "base")
        await example.execute("DROP TABLE alembic_version")


def load_anew(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """Have the example imported anew, with variables of the environment."""
    for variable, value in ({"ENVIRONMENT": "development"} | environment).items():
        monkeypatch.setenv(variable, value)
    for name in list(sys.modules):
        if name.startswith(PACKAGES) and name != MODELS:
            monkeypatch.delitem(sys.modules, name)


async def sign_up(client: httpx.AsyncClient, name: str) -> dict[str, str]:
    """Return the headers with which a new user is known."""
    response = await client.post(f"/users/{name}")
    assert response.status_code == 201
    return {"Authorization": f"Bearer {response.json()}"}
