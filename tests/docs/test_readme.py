"""What the README and the home page show, run."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pytest
import pytest_asyncio
from sqlalchemy import text

from examples import demo
from tests.helpers.database import Database
from tests.helpers.programs import Outside, is_all_closed, until
from tests.helpers.serving import http_client

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
HOME = (ROOT / "docs" / "index.md").read_text()
STARTED = (ROOT / "docs" / "getting-started.md").read_text()
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
QUICKSTARTS = ["quickstart", "quickstart_starlette", "quickstart_asgi"]


@pytest.mark.parametrize("name", QUICKSTARTS)
def test_a_quickstart_is_shown_whole_and_short(name: str) -> None:
    code = (ROOT / "examples" / f"{name}.py").read_text()
    assert textwrap.indent(code, "    ") in STARTED  # in a tab
    assert code in README or name != "quickstart"
    assert len(code.splitlines()) <= 55


def test_what_the_demo_prints_is_shown() -> None:
    for title in demo.SCENARIOS:
        assert f"\n| {title} | " in RELIABILITY


@pytest.mark.parametrize("name", QUICKSTARTS)
async def test_a_quickstart_serves_requests(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart: Any = importlib.import_module(f"examples.{name}")
    async with http_client(quickstart.app, log_level="critical") as client:
        assert (await client.post("/notes/milk")).status_code == 201
        assert (await client.post("/notes/milk")).status_code == 500
        assert (await client.post("/notes/bread")).status_code == 201
        assert (await client.get("/favicon.ico")).status_code == 404
    url = f"sqlite+aiosqlite:///{tmp_path / 'notes.db'}"
    assert await Outside(url).rows("SELECT body FROM note") == ["milk", "bread"]
    await until(lambda: is_all_closed(quickstart))


async def test_with_postgresql_only_the_url_of_the_quickstart_changes(
    postgresql: str, database: Database
) -> None:
    await database.execute("DROP TABLE IF EXISTS note")
    code = (ROOT / "examples" / "quickstart.py").read_text()
    program: dict[str, Any] = {"__name__": "quickstart"}
    code = code.replace("sqlite:///notes.db", postgresql)
    exec(compile(code, "quickstart.py", "exec", dont_inherit=True), program)
    try:
        async with http_client(program["app"], log_level="critical") as client:
            assert (await client.post("/notes/milk")).status_code == 201
            assert (await client.post("/notes/milk")).status_code == 500
        assert await Outside(postgresql).rows("SELECT body FROM note") == ["milk"]
    finally:
        await database.execute("DROP TABLE IF EXISTS note")


FIRST_TEST = {
    "conftest.py": "examples/quickstart_conftest.py",
    "test_quickstart.py": "examples/quickstart_tests.py",
}
SETTINGS = re.search(r"as `pyproject.toml`:\n\n```toml\n(.*?)```", STARTED, re.DOTALL)


def test_the_first_test_is_shown_whole() -> None:
    for name, example in FIRST_TEST.items():
        assert f"`{name}`" in STARTED
        assert f"```python\n{(ROOT / example).read_text()}```\n" in STARTED


def run_first_test(directory: Path, quickstart: str) -> subprocess.CompletedProcess[str]:
    """Run the first test as a reader does, beside a quickstart."""
    assert SETTINGS is not None
    (directory / "pyproject.toml").write_text(SETTINGS[1])
    (directory / "quickstart.py").write_text(quickstart)
    for name, example in FIRST_TEST.items():
        shutil.copy(ROOT / example, directory / name)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin"],
        cwd=directory,
        # Of pytest's plugins, the reader has no other.
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("name", QUICKSTARTS)
async def test_the_first_test_passes_after_try_it_and_stores_nothing(
    name: str, tmp_path: Path
) -> None:
    notes = Outside(f"sqlite+aiosqlite:///{tmp_path / 'notes.db'}")
    async with notes.connection() as connection:
        await connection.execute(text("CREATE TABLE note (body VARCHAR PRIMARY KEY)"))
        await connection.execute(text("INSERT INTO note VALUES ('milk')"))
    quickstart = (ROOT / "examples" / f"{name}.py").read_text()
    done = run_first_test(tmp_path, quickstart)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert await notes.rows("SELECT body FROM note") == ["milk"]


def test_the_first_test_fails_if_nothing_is_stored(tmp_path: Path) -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    done = run_first_test(tmp_path, quickstart.replace("session.add(", "print("))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DID NOT RAISE" in done.stdout


def test_the_home_page_begins_with_what_goes_wrong_without_the_library() -> None:
    without, with_library = re.findall(r"^```python\n(.*?)^```$", HOME, re.DOTALL | re.MULTILINE)[
        :2
    ]
    assert "Depends(get_session)" in without
    assert "db_session(connect)" in with_library


@pytest.fixture
def comparison(url: str, load: Callable[[str, str], Any]) -> Any:
    return load("comparison", url)


@pytest_asyncio.fixture
async def client(comparison: Any) -> AsyncGenerator[httpx.AsyncClient]:
    async with http_client(comparison.app, log_level="critical") as client:
        yield client


@pytest.mark.parametrize("way", ["by-hand", "depends", "library"])
async def test_the_ways_that_the_home_page_compares_differ_as_it_says(
    way: str, client: httpx.AsyncClient, url: str
) -> None:
    assert (await client.post(f"/{way}/users/ann")).status_code == 201
    await until(lambda: Outside(url).rows("SELECT name FROM user_account"))
    again = await client.post(f"/{way}/users/ann")
    version = tuple(map(int, fastapi.__version__.split(".")[:2]))
    is_told_too_early = way == "depends" and version >= (0, 118)
    assert again.status_code == (201 if is_told_too_early else 500)
    assert await Outside(url).rows("SELECT name FROM user_account") == ["ann"]
