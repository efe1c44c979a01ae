"""The code of the README runs, and is that of the examples."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from context_async_sqlalchemy import DBConnect
from examples import demo, quickstart
from examples.serving import http_client

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_first_block_is_the_quickstart() -> None:
    code = Path(quickstart.__file__).read_text()
    assert BLOCKS[0] == code
    assert len(code.splitlines()) <= 30


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_runs(code: str) -> None:
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


def test_what_the_demo_prints_is_shown() -> None:
    for title in demo.SCENARIOS:
        assert f"│ ✓ │ {title} " in README.read_text()


@pytest_asyncio.fixture
async def client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[httpx.AsyncClient]:
    monkeypatch.chdir(tmp_path)
    async with http_client(quickstart.app) as client:
        yield client


async def test_the_quickstart_serves_requests(client: httpx.AsyncClient, tmp_path: Path) -> None:
    assert (await client.post("/notes/milk")).status_code == 201
    assert (await client.post("/notes/milk")).status_code == 500
    assert (await client.post("/notes/bread")).status_code == 201
    assert (tmp_path / "notes.db").exists()


def test_the_connect_of_the_quickstart_is_closed_with_it() -> None:
    connect: Any = quickstart.connect
    assert isinstance(connect, DBConnect)
    assert connect.engine is None
