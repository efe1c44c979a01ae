"""The examples of the workflows: their commands, their pages, and their tests as users run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from examples.workflows.routes import ROUTES
from tests.helpers.programs import ROOT, Outside
from tests.helpers.servers import running_module

EXAMPLES = ["fastapi_example", "starlette_example", "asgi_example"]


@pytest.mark.parametrize("example", EXAMPLES)
async def test_the_command_serves_the_workflows(example: str, url: str, tmp_path: Path) -> None:
    outside = Outside(url)
    command = f"examples.{example} --port {{port}}"
    with running_module(command, tmp_path / "log", DATABASE_URL=url) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.post("/simple_usage")).status_code == 200
            stored = ["by the handler", "by a function that it calls"]
            assert (await client.get("/notes")).json() == stored
            assert (await client.get("/nothing")).status_code == 404
        assert await outside.rows("SELECT text FROM workflow_note ORDER BY id") == stored
    async with outside.connection() as connection:
        await connection.exec_driver_sql("DROP TABLE workflow_note")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_application_does_not_start_without_its_database(example: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": "postgresql://app:hunter2@127.0.0.1:1/notes"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert "ConnectionRefusedError" in result.stderr
    assert "Application startup failed" in result.stderr
    assert "hunter2" not in result.stderr


def test_whoever_copies_an_example_runs_its_tests_on_sqlite(tmp_path: Path) -> None:
    project, temporary = tmp_path / "project", tmp_path / "temporary"
    temporary.mkdir()
    shutil.copytree(ROOT / "examples", project / "examples", ignore=all_but_what_the_readme_names)
    url = f"sqlite:///{tmp_path / 'precious.db'}"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov"),
            *("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"),
        ],
        cwd=project,
        env={k: v for k, v in os.environ.items() if k != "TEST_DATABASE_URL"}
        | {"DATABASE_URL": url, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert re.search(r"^\d+ passed", result.stdout, re.MULTILINE)
    assert {*tmp_path.iterdir()} == {project, temporary}, "the tests have a database of their own"
    assert list(temporary.iterdir()) == []
    assert list(project.iterdir()) == [project / "examples"]


def all_but_what_the_readme_names(directory: str, names: list[str]) -> set[str]:
    if Path(directory) != ROOT / "examples":
        return {"__pycache__"}
    # The package `examples` of the repository would come before a directory of this name.
    named = {"fastapi_example", "workflows", "conftest.py", "__init__.py"}
    return set(names) - named


def table_of(example: str) -> list[str]:
    """Return the rows on workflows in the README of an example."""
    page = (ROOT / "examples" / example / "README.md").read_text()
    return [line for line in page.splitlines() if re.search(r"\| `(GET|POST) /", line)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_route_is_in_the_readme(example: str) -> None:
    routes = re.findall(r"`((?:GET|POST) /\S+)`", "\n".join(table_of(example)))
    assert sorted(routes) == sorted(f"{route.method} {route.path}" for route in ROUTES)
    assert table_of(example) == table_of("fastapi_example")
