"""A test of the library before the move: it overrides the dependency."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from importlib import reload
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from examples.moving import depends_before
from examples.moving.models import Base, Entry


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(
        "DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path / 'library.db'}"
    )
    return reload(depends_before)


@pytest_asyncio.fixture
async def session(library: Any) -> AsyncGenerator[AsyncSession]:
    async with library.engine.connect() as connection:
        await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(
            connection,
            join_transaction_mode="create_savepoint",
            expire_on_commit=False,
        ) as session:
            yield session
        await connection.rollback()
    await library.engine.dispose()


@pytest_asyncio.fixture
async def client(
    library: Any, session: AsyncSession
) -> AsyncGenerator[httpx.AsyncClient]:
    library.app.dependency_overrides[library.get_session] = lambda: session
    transport = httpx.ASGITransport(app=library.app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test"
    ) as client:
        yield client


async def test_a_loan_is_noted(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    assert (await client.post("/loans/Emma/ann")).status_code == 201
    assert list(await session.scalars(select(Entry.text))) == ["ann takes Emma"]
