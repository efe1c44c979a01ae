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

from tests.helpers.programs import ROOT, Outside
from tests.helpers.servers import running_module

APPLICATIONS = [
    "examples.fastapi_example.app:app",
    "examples.starlette_example.app:app",
    "examples.asgi_example.app:app",
]
EXAMPLES = ["fastapi_example", "starlette_example", "asgi_example"]


@pytest.mark.parametrize("application", APPLICATIONS)
async def test_the_command_serves_the_workflows(application: str, url: str, tmp_path: Path) -> None:
    outside = Outside(url)
    command = f"uvicorn {application} --port {{port}}"
    with running_module(command, tmp_path / "log", DATABASE_URL=url) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            assert (await client.post("/simple_usage")).status_code == 200
            stored = ["by the handler", "by a function that it calls"]
            assert (await client.get("/notes")).json() == stored
            assert (await client.get("/nothing")).status_code == 404
        assert await outside.rows("SELECT text FROM workflow_note ORDER BY id") == stored
    async with outside.connection() as connection:
        await connection.exec_driver_sql("DROP TABLE workflow_note")


@pytest.mark.parametrize("application", APPLICATIONS)
def test_an_application_does_not_start_without_its_database(application: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "uvicorn", application, "--port", "0"],
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


@pytest.mark.parametrize("example", EXAMPLES)
def test_whoever_copies_an_example_runs_its_tests_on_sqlite(example: str, tmp_path: Path) -> None:
    project, temporary = tmp_path / "project", tmp_path / "temporary"
    temporary.mkdir()
    # Under another name: no test may import what is beside it in the repository.
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "examples" / example, project / "notes", ignore=ignored)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", "notes"],
        cwd=project,
        env={k: v for k, v in os.environ.items() if k != "TEST_DATABASE_URL"}
        | {
            "DATABASE_URL": f"sqlite:///{tmp_path / 'precious.db'}",
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert re.search(r"^41 passed", result.stdout, re.MULTILINE), result.stdout[-4000:]
    assert {*tmp_path.iterdir()} == {project, temporary}, "the tests have a database of their own"
    assert list(temporary.iterdir()) == []
    assert list(project.iterdir()) == [project / "notes"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_needs_nothing_else_of_the_repository(example: str) -> None:
    for file in (ROOT / "examples" / example).rglob("*.py"):
        imports = r"^\s*(from|import) (examples|tests)\b"
        assert not re.search(imports, file.read_text(), re.MULTILINE), file


ROW = re.compile(r"^\|.*\| `(?P<method>GET|POST) (?P<path>/\S+)` \| (?P<status>\d+)", re.MULTILINE)


@pytest.mark.parametrize("application", APPLICATIONS)
async def test_every_request_in_the_readme_is_answered_as_it_says(
    application: str, tmp_path: Path
) -> None:
    page = (ROOT / application.replace(".", "/")).parent / "README.md"
    rows = list(ROW.finditer(page.read_text()))
    assert len(rows) == 20
    database = f"sqlite:///{tmp_path / 'workflows.db'}"
    command = f"uvicorn {application} --port {{port}}"
    anew = httpx.Limits(max_keepalive_connections=0)  # uvicorn cuts the connection of an exception
    with running_module(command, tmp_path / "log", DATABASE_URL=database) as port:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, limits=anew) as client:
            for row in rows:
                response = await client.request(row["method"], row["path"])
                assert response.status_code == int(row["status"]), row["path"]


def test_the_readmes_have_the_same_table_with_every_route() -> None:
    tables = []
    for example in EXAMPLES:
        directory = ROOT / "examples" / example
        page, program = ((directory / name).read_text() for name in ("README.md", "app.py"))
        tables.append([line for line in page.splitlines() if ROW.match(line)])
        shown = {row["path"].split("/")[1] for row in ROW.finditer(page)}
        assert shown == set(re.findall(r'"/(\w+)', program))
    assert tables[0] == tables[1] == tables[2]
