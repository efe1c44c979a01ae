"""On the real database: migrations, its health, and requests that conflict."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from sqlalchemy import delete

from context_async_sqlalchemy import DBConnect, new_non_ctx_atomic_session
from library.models import Book, Loan

DUNE = "9780441013593"


@pytest.fixture
def no_real_database() -> None:
    """Refuse nothing in this module."""


@pytest.fixture
async def client(
    app: FastAPI, db_connect: DBConnect
) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client outside of a transaction; delete what was stored."""
    transport = httpx.ASGITransport(app)
    async with (
        db_connect,
        httpx.AsyncClient(
            transport=transport, base_url="http://test"
        ) as client,
    ):
        yield client
        async with new_non_ctx_atomic_session(db_connect) as session:
            await session.execute(delete(Loan))
            await session.execute(delete(Book))


def test_the_migrations_make_what_the_models_describe() -> None:
    config = Config(Path(__file__).parents[1] / "alembic.ini")
    command.check(config)


async def test_a_load_balancer_is_told_that_the_database_is_well(
    client: httpx.AsyncClient,
) -> None:
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json()["healthy"]


async def test_one_of_two_readers_at_the_same_time_gets_the_book(
    client: httpx.AsyncClient,
) -> None:
    await client.post("/books", json={"isbn": DUNE, "title": "Dune"})
    lend = f"/books/{DUNE}/loan?reader="
    responses = await asyncio.gather(
        *(client.post(lend + reader) for reader in ("ann", "bob"))
    )
    assert {response.status_code for response in responses} == {201, 409}
