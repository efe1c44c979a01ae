"""The application commits as usual, on a real server; each test looks with its own session."""

import asyncio
import socket
from collections.abc import AsyncGenerator

import httpx
import pytest
import pytest_asyncio
import uvicorn
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from .app import Note, connect, setup_app

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def client() -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client of the application on a real server; check that no connection leaks."""
    listener = socket.create_server(
        ("127.0.0.1", 0)
    )  # clients wait until the server has started
    server = uvicorn.Server(
        uvicorn.Config(setup_app(), log_config=None, ws="none")
    )
    serving = asyncio.create_task(server.serve([listener]))
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url) as client:
            await client.get("/notes")  # once it answers, the tables exist
            yield client
            assert connect.pool_status().checked_out == 0
    finally:
        server.should_exit = True
        await serving
    assert connect.engine is None, (
        "the application has not closed its connections"
    )


@pytest_asyncio.fixture
async def session(client: httpx.AsyncClient) -> AsyncGenerator[AsyncSession]:
    """Return a session on its own connection; empty the table at the end."""
    engine = await connect.create_engine()
    async with AsyncSession(engine) as session:
        yield session
        await session.rollback()
        await session.execute(delete(Note))
        await session.commit()
    await engine.dispose()


async def stored(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(Note.text).order_by(Note.id)))


ERROR = "Internal Server Error"


@pytest.mark.parametrize(
    ("path", "status", "answer", "rows"),
    [
        (
            "/simple_usage",
            200,
            "null",
            ["by the handler", "by a function that it calls"],
        ),
        ("/atomic", 500, ERROR, ["in a block"]),
        ("/early_commit", 500, ERROR, ["before the commit"]),
        ("/early_rollback", 200, "null", ["after the rollback"]),
        (
            "/early_close",
            200,
            "true",
            ["committed before the close", "after the close"],
        ),
        (
            "/sessions_outside_the_context",
            500,
            ERROR,
            ["committed by hand", "committed at the end of the block"],
        ),
        ("/rollback_by_exception", 500, ERROR, []),
        ("/rollback_by_status_code", 409, "null", []),
    ],
)
async def test_a_workflow_is_answered_and_stored(
    client: httpx.AsyncClient,
    session: AsyncSession,
    path: str,
    status: int,
    answer: str,
    rows: list[str],
) -> None:
    response = await client.post(path)
    assert (response.status_code, response.text) == (status, answer)
    assert await stored(session) == rows


BEFORE, BLOCK = "before the block", "in the block"


@pytest.mark.parametrize(
    ("path", "status", "answer", "rows"),
    [
        ("commit/passing", 200, "false", [BEFORE, BLOCK]),
        ("commit/failing", 200, "false", [BEFORE]),
        ("rollback/passing", 200, "false", [BLOCK]),
        ("rollback/failing", 200, "false", []),
        ("append/passing", 200, "false", [BEFORE, BLOCK]),
        ("append/failing", 200, "false", []),
        ("raise/passing", 500, ERROR, []),
        ("raise/failing", 500, ERROR, []),
        ("savepoint/passing", 200, "true", [BEFORE, BLOCK]),
        ("savepoint/failing", 200, "true", [BEFORE]),
    ],
)
async def test_an_atomic_block_finds_a_transaction_open(
    client: httpx.AsyncClient,
    session: AsyncSession,
    path: str,
    status: int,
    answer: str,
    rows: list[str],
) -> None:
    response = await client.post(f"/atomic_after_open_transaction/{path}")
    assert (response.status_code, response.text) == (status, answer)
    assert await stored(session) == rows


async def test_notes_are_read(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    session.add(Note(text="by the test"))
    await session.commit()
    response = await client.get("/notes")
    assert (response.status_code, response.json()) == (200, ["by the test"])


async def test_concurrent_queries_have_connections_of_their_own(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    assert connect.pool_status().checked_in == 1
    response = await client.post("/concurrent_queries")
    assert response.status_code == 200
    assert connect.pool_status().checked_in == 2
    assert set(await stored(session)) == {"one", "another"}


async def test_requests_at_the_same_time_are_transactions_of_their_own(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    paths = [
        "/simple_usage",
        "/rollback_by_status_code",
        "/rollback_by_exception",
    ]
    responses = await asyncio.gather(*(client.post(path) for path in paths))
    assert [response.status_code for response in responses] == [200, 409, 500]
    assert await stored(session) == [
        "by the handler",
        "by a function that it calls",
    ]
