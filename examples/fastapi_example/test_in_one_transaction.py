"""Each test shares one transaction with the application, which is rolled back at the end."""

from collections.abc import AsyncGenerator

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy.test_utils import shared_transaction

from .app import Base, Note, connect, setup_app

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def session() -> AsyncGenerator[AsyncSession]:
    """Return the test's session in the transaction, where the tables exist."""
    async with connect:
        async with shared_transaction(connect) as session:
            await (await session.connection()).run_sync(
                Base.metadata.create_all
            )
            await session.commit()
            yield session
        assert connect.pool_status().checked_out == 0


@pytest_asyncio.fixture
async def client(session: AsyncSession) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client that calls the application on the test's event loop."""
    # Like a server, answer an exception with 500 instead of raising it here.
    transport = httpx.ASGITransport(setup_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test"
    ) as client:
        yield client


async def stored(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


async def test_notes_are_read(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    session.add(Note(text="by the test"))
    await session.commit()
    response = await client.get("/notes")
    assert (response.status_code, response.json()) == (200, ["by the test"])


async def test_simple_usage_is_committed(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    response = await client.post("/simple_usage")
    assert response.status_code == 200
    assert await stored(session) == [
        "by the handler",
        "by a function that it calls",
    ]


async def test_an_atomic_block_is_committed_or_rolled_back_alone(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    response = await client.post("/atomic")
    assert response.status_code == 500
    assert await stored(session) == ["in a block"]


BEFORE, BLOCK = "before the block", "in the block"


@pytest.mark.parametrize(
    ("mode", "is_open_after_it", "passing", "failing"),
    [
        ("commit", False, [BEFORE, BLOCK], [BEFORE]),
        ("rollback", False, [BLOCK], []),
        ("append", False, [BEFORE, BLOCK], []),
        ("savepoint", True, [BEFORE, BLOCK], [BEFORE]),
    ],
)
@pytest.mark.parametrize("block", ["passing", "failing"])
async def test_an_atomic_block_finds_a_transaction_open(
    client: httpx.AsyncClient,
    session: AsyncSession,
    mode: str,
    block: str,
    is_open_after_it: bool,
    passing: list[str],
    failing: list[str],
) -> None:
    response = await client.post(
        f"/atomic_after_open_transaction/{mode}/{block}"
    )
    assert (response.status_code, response.json()) == (200, is_open_after_it)
    assert await stored(session) == (passing if block == "passing" else failing)


@pytest.mark.parametrize("block", ["passing", "failing"])
async def test_an_atomic_block_may_refuse_an_open_transaction(
    client: httpx.AsyncClient, session: AsyncSession, block: str
) -> None:
    response = await client.post(
        f"/atomic_after_open_transaction/raise/{block}"
    )
    assert response.status_code == 500
    assert await stored(session) == []


async def test_what_was_committed_early_stays(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    response = await client.post("/early_commit")
    assert response.status_code == 500
    assert await stored(session) == ["before the commit"]


async def test_the_request_goes_on_after_a_rollback(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    response = await client.post("/early_rollback")
    assert response.status_code == 200
    assert await stored(session) == ["after the rollback"]


async def test_the_request_goes_on_with_a_new_session_after_a_close(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    response = await client.post("/early_close")
    assert (response.status_code, response.json()) == (200, True)
    assert await stored(session) == [
        "committed before the close",
        "after the close",
    ]


async def test_concurrent_queries_are_committed(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    response = await client.post("/concurrent_queries")
    assert response.status_code == 200
    assert set(await stored(session)) == {"one", "another"}


async def test_sessions_outside_the_context_do_not_fail_with_the_request(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    response = await client.post("/sessions_outside_the_context")
    assert response.status_code == 500
    assert await stored(session) == [
        "committed by hand",
        "committed at the end of the block",
    ]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/rollback_by_exception", 500), ("/rollback_by_status_code", 409)],
)
async def test_nothing_stays_of_a_request_that_fails(
    client: httpx.AsyncClient, session: AsyncSession, path: str, status: int
) -> None:
    response = await client.post(path)
    assert response.status_code == status
    assert await stored(session) == []
