"""The house: what CONTRIBUTING and the life of a request say of it is so."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import context_async_sqlalchemy

PACKAGE = Path(context_async_sqlalchemy.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_the_life_of_a_request_is_six_files_of_at_most_900_lines() -> None:
    page = (ROOT / "docs" / "life-of-a-request.md").read_text()
    files = re.findall(r"^\d\. `(\w+/\w+\.py)`: ", page, re.MULTILINE)
    assert len(files) == len(set(files)) == 6
    assert sum(lines_of(PACKAGE / file) for file in files) <= 900


def test_no_file_holds_two_ideas() -> None:
    assert [file.name for file in FILES if lines_of(file) > 300] == []


def test_the_drawing_of_the_rooms_is_what_is_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contracts["contracts"][0]["layers"]]
    drawing = (ROOT / "CONTRIBUTING.md").read_text().split("```")[-2]
    drawn = [re.findall(r"\w+", line) for line in drawing.splitlines() if re.search(r"\w", line)]
    assert [sorted(line) for line in drawn] == [sorted(layer) for layer in layers]
    there = {path.stem for path in PACKAGE.iterdir()} - {"__init__", "__pycache__", "py"}
    assert {name for line in drawn for name in line} == there


def test_the_core_imports_no_framework_and_nothing_that_is_optional() -> None:
    code = "import context_async_sqlalchemy, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[0] for name in result.stdout.split()}
    optional = {"fastapi", "starlette", "stamina", "asyncpg", "aiosqlite", "pytest"}
    assert imported & optional == set()
    assert "sqlalchemy" in imported
