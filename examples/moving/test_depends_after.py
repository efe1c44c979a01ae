"""A test of the library after the move: all code shares one transaction."""

from __future__ import annotations

from importlib import reload
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy.asgi_types import ASGIApp

# In the conftest.py at the root of a project, instead of this import:
# pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]
from context_async_sqlalchemy.pytest_plugin import client, shared_session
from examples.moving import depends_after, depends_between
from examples.moving.models import Base, Entry

__all__ = ["client", "shared_session"]


@pytest.fixture(
    params=[depends_between, depends_after], ids=["between", "after"]
)
def library(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    monkeypatch.setenv(
        "DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path / 'library.db'}"
    )
    return reload(request.param)


@pytest.fixture
def db_connect(library: Any) -> DBConnect:
    connect: DBConnect = library.connect
    return connect


@pytest.fixture
def app(library: Any) -> ASGIApp:
    app: ASGIApp = library.app
    return app


@pytest_asyncio.fixture(autouse=True)
async def tables(shared_session: AsyncSession) -> None:
    await (await shared_session.connection()).run_sync(Base.metadata.create_all)
    await shared_session.commit()


async def test_a_loan_is_noted(
    client: httpx.AsyncClient, shared_session: AsyncSession
) -> None:
    assert (await client.post("/loans/Emma/ann")).status_code == 201
    assert list(await shared_session.scalars(select(Entry.text))) == [
        "ann takes Emma"
    ]
    assert (await client.delete("/loans/Emma")).status_code == 204
    assert list(
        await shared_session.scalars(select(Entry.text).order_by(Entry.id))
    ) == [
        "ann takes Emma",
        "thank you, ann",
    ]
