"""Tests of the notes, each in a transaction that is rolled back, whatever framework serves them."""

from __future__ import annotations

from importlib import import_module, reload
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy.asgi_types import ASGIApp

# In the conftest.py at the root of a project, instead of this import:
# pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]
from context_async_sqlalchemy.pytest_plugin import client, shared_session

__all__ = ["client", "shared_session"]


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


@pytest.fixture
def app(notes: Any) -> ASGIApp:
    app: ASGIApp = notes.app
    return app


@pytest_asyncio.fixture(autouse=True)
async def table(notes: Any, shared_session: AsyncSession) -> None:
    await shared_session.execute(text("CREATE TABLE note (title TEXT)"))
    await shared_session.commit()
    if notes.__name__.endswith("blacksheep"):
        await notes.application.start()


async def test_a_note_is_stored_once(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    assert (await client.post("/notes/milk")).status_code == 201
    assert (await client.post("/notes/milk")).status_code == 409
    titles = await shared_session.scalars(text("SELECT title FROM note"))
    assert list(titles) == ["milk"]
