"""Fixtures of the tests of each framework."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import insert, text

from context_async_sqlalchemy import db_session
from tests.helpers.database import Database
from tests.helpers.integrations import LOGGERS, Work, served
from tests.helpers.models import Item
from tests.helpers.programs import Outside, is_all_closed, load_program


@pytest.fixture(params=LOGGERS)
def framework(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database: PostgreSQL, unless a test asks for the other one."""
    if getattr(request, "param", "postgresql") == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'notes.db'}"
    url: str = request.getfixturevalue("postgresql")
    return url


@pytest_asyncio.fixture
async def program(framework: str, url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Any]:
    program = load_program(monkeypatch, f"integrations.{framework}", DATABASE_URL=url)
    yield program
    assert is_all_closed(program)
    async with Outside(url).connection() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS note"))


@pytest_asyncio.fixture
async def client(program: Any, database: Database) -> AsyncGenerator[httpx.AsyncClient]:
    async with served(program, database, program.app) as client:
        yield client


@pytest.fixture
def handle(program: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Return a way to let the program do something else than to add a note, or to read the notes.

    It adds an item and then does the work, in the streamed body for three items.
    """

    def handle(work: Work) -> None:
        async def add_item(title: str) -> int:
            session = await db_session(program.connect)
            await session.execute(insert(Item).values(name=title))
            return await work(title)

        async def stream() -> AsyncGenerator[bytes]:
            for title in "one", "two", "bad":
                await add_item(title)
                yield f"{title}\n".encode()

        monkeypatch.setattr(program, "add_note", add_item)
        monkeypatch.setattr(program, "read_notes", stream)

    return handle
