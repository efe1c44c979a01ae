"""What the README and the home page show, run."""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pytest
import pytest_asyncio

from examples import demo
from tests.helpers.programs import Outside, is_all_closed, until
from tests.helpers.serving import http_client

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
QUICKSTARTS = ["quickstart", "quickstart_starlette", "quickstart_asgi"]


@pytest.mark.parametrize("name", QUICKSTARTS)
def test_a_quickstart_is_shown_whole_and_short(name: str) -> None:
    code = (ROOT / "examples" / f"{name}.py").read_text()
    assert code in (ROOT / "docs" / "getting-started.md").read_text()
    assert code in README or name != "quickstart"
    assert len(code.splitlines()) <= 45


def test_what_the_demo_prints_is_shown() -> None:
    for title in demo.SCENARIOS:
        assert f"│ ✓ │ {title} " in README


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


@pytest.fixture
def comparison(url: str, load: Callable[[str, str], Any]) -> Any:
    return load("comparison", url)


@pytest_asyncio.fixture
async def client(comparison: Any) -> AsyncGenerator[httpx.AsyncClient]:
    async with http_client(comparison.app, log_level="critical") as client:
        yield client


@pytest.mark.parametrize("way", ["by-hand", "depends", "library"])
async def test_the_three_ways_of_the_home_page_differ_as_it_says(
    way: str, client: httpx.AsyncClient, url: str
) -> None:
    assert (await client.post(f"/{way}/users/ann")).status_code == 201
    await until(lambda: Outside(url).rows("SELECT name FROM user_account"))
    again = await client.post(f"/{way}/users/ann")
    version = tuple(map(int, fastapi.__version__.split(".")[:2]))
    is_told_too_early = way == "depends" and version >= (0, 118)
    assert again.status_code == (201 if is_told_too_early else 500)
    assert await Outside(url).rows("SELECT name FROM user_account") == ["ann"]
