"""Tests of the notes, each in a transaction that is rolled back, whatever framework serves them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from importlib import import_module, reload
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect

# In the conftest.py at the root of a project, instead of this import:
# pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]
from context_async_sqlalchemy.pytest_plugin import shared_session

__all__ = ["shared_session"]


PROGRAMS = [
    "examples.integrations.fastapi",
    "examples.integrations.starlette",
    "examples.integrations.asgi",
    "examples.integrations.litestar",
    "examples.integrations.quart",
    "examples.integrations.blacksheep",
]


@pytest.fixture(params=PROGRAMS)
def notes(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'notes.db'}")
    return reload(import_module(request.param))


@pytest.fixture
def db_connect(notes: Any) -> DBConnect:
    connect: DBConnect = notes.connect
    return connect


@pytest_asyncio.fixture
async def client(
    notes: Any, shared_session: AsyncSession
) -> AsyncGenerator[httpx.AsyncClient]:
    await shared_session.execute(text("CREATE TABLE note (title TEXT)"))
    await shared_session.commit()
    if notes.__name__.endswith("blacksheep"):
        await notes.application.start()
    transport = httpx.ASGITransport(app=notes.app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test"
    ) as client:
        yield client


async def test_a_note_is_stored_once(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    assert (await client.post("/notes/milk")).status_code == 201
    assert (await client.post("/notes/milk")).status_code == 409
    titles = await shared_session.scalars(text("SELECT title FROM note"))
    assert list(titles) == ["milk"]
