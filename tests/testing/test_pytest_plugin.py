"""The fixtures for users' tests, imported, and under each plugin that runs async tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.testclient import TestClient

from context_async_sqlalchemy import (
    DBConnect,
    new_non_ctx_atomic_session,
    pytest_plugin,
    run_in_new_ctx,
)
from context_async_sqlalchemy.pytest_plugin import shared_client, shared_session
from tests.helpers.models import Base, Item
from tests.helpers.programs import ROOT, Outside
from tests.helpers.shared import Served, names_in

__all__ = ["shared_client", "shared_session"]  # fixtures

PROGRAM = ROOT / "examples" / "how_to" / "testing.py"

RUNS = {
    "anyio alone": ("anyio", ["-p", "no:asyncio"]),
    "anyio beside pytest-asyncio": ("anyio", []),
    "pytest-asyncio alone": ("asyncio", ["-p", "no:anyio"]),
    "pytest-asyncio in auto mode": ("asyncio", ["--asyncio-mode=auto"]),
}


@pytest.fixture
def db_connect(tmp_path: Path) -> Generator[DBConnect]:
    """Return a connect to a database in which a test leaves nothing."""
    connect = DBConnect.from_url(f"sqlite:///{tmp_path / 'items.db'}")

    async def create() -> None:
        async with connect, new_non_ctx_atomic_session(connect) as session:
            connection = await session.connection()
            await connection.run_sync(Base.metadata.tables["item"].create)

    async def count() -> int | None:
        async with connect, new_non_ctx_atomic_session(connect) as session:
            return await session.scalar(select(func.count()).select_from(Item))

    asyncio.run(create())
    yield connect
    assert asyncio.run(count()) == 0


@pytest.fixture
def app(db_connect: DBConnect) -> Starlette:
    return Served(db_connect).app


async def test_the_session_sees_what_the_application_commits(
    shared_session: AsyncSession, db_connect: DBConnect
) -> None:
    await run_in_new_ctx(Served(db_connect).insert, "a")
    assert await names_in(shared_session) == ["a"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_each_test_of_a_sync_client_begins_anew(shared_client: TestClient, name: str) -> None:
    assert shared_client.get(f"/add/{name}").status_code == 200
    assert shared_client.get("/names/of").json() == [name]


def run_pytest(tests: Path, url: str, *options: str) -> str:
    """Run the tests of a file in a process; return what pytest says."""
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *options, str(tests)],
        cwd=tests.parent,
        env=os.environ | {"DATABASE_URL": url, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    url: str = request.getfixturevalue("postgresql")
    return url


@pytest.mark.parametrize(
    ("url", "run"),
    # Each plugin, and each kind of marker with a server.
    [*(("sqlite", run) for run in RUNS), *(("postgresql", run) for run in [*RUNS][::2])],
    indirect=["url"],
)
async def test_the_program_of_the_page_passes_under_each_plugin(
    url: str, tmp_path: Path, run: str
) -> None:
    marker, options = RUNS[run]
    code = PROGRAM.read_text().replace("pytest.mark.anyio", f"pytest.mark.{marker}")
    if marker == "asyncio":
        # What this plugin's users write for a fixture of their own.
        code = code.replace("@pytest.fixture(name=", "@pytest_asyncio.fixture(name=")
        code = code.replace("import pytest\n", "import pytest\nimport pytest_asyncio\n")
    tests = tmp_path / "test_guests.py"
    tests.write_text(code)
    try:
        assert "3 passed" in run_pytest(tests, url, *options)
        assert await Outside(url).rows("SELECT name FROM how_to_guest") == []
    finally:
        async with Outside(url).connection() as connection:
            await connection.exec_driver_sql("DROP TABLE IF EXISTS how_to_guest")


def test_the_loop_of_a_test_that_has_ended_is_not_kept(db_connect: DBConnect) -> None:
    for _ in range(3):
        asyncio.run(pytest_plugin._close_with_loop(db_connect))
    assert not pytest_plugin._closing


def test_pytest_is_not_imported_by_the_package() -> None:
    code = "import sys, context_async_sqlalchemy.test_utils; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
