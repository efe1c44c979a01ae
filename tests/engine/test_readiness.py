"""Whether the database answers: asked once, or until it does."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from sqlalchemy import URL, event, select
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Mapped, mapped_column

from context_async_sqlalchemy import DBConnect
from tests.helpers.database import Database, make_connect
from tests.helpers.mocks import Creators
from tests.helpers.models import Base, Item
from tests.helpers.postgres import free_port
from tests.helpers.programs import until
from tests.helpers.proxy import Call, proxy


async def test_ping_answers_or_raises(connect: DBConnect, database_url: URL) -> None:
    await connect.ping()
    async with make_connect(database_url.set(port=free_port())) as refused:
        with pytest.raises(ConnectionRefusedError):
            await refused.ping()


async def test_ping_waits_no_longer_than_it_is_told(connect: DBConnect, database: Database) -> None:
    assert await connect.session_maker()
    assert connect.engine is not None
    async with AsyncExitStack() as stack:
        for _ in range(15):
            await stack.enter_async_context(connect.engine.connect())
        with pytest.raises(TimeoutError):
            await connect.ping(timeout=0.05)
    await connect.ping()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_ping_does_not_wait_for_the_end_of_a_silent_connection(
    database_url: URL, database: Database, driver: str
) -> None:
    speaks = asyncio.Event()
    speaks.set()

    async def hang(_: Call) -> None:
        await speaks.wait()

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, hang) as port:
        tasks = asyncio.all_tasks()
        url = database_url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=port)
        async with make_connect(url) as connect:
            await connect.ping()
            speaks.clear()
            # asyncpg closes such a connection in 2 seconds, psycopg in 5.
            async with asyncio.timeout(2):
                with pytest.raises(TimeoutError):
                    await connect.ping(timeout=0.5)
            speaks.set()
        await until(lambda: asyncio.all_tasks() <= tasks)
    await database.is_left_by_all()


async def test_a_database_that_comes_up_late_is_waited_for(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    directory = tmp_path / "later"
    connect = DBConnect.from_url(f"sqlite:///{directory}/test.db")
    waiting = asyncio.create_task(connect.wait_until_ready(attempts=1000, delay=0.001))
    async with asyncio.timeout(30):
        while not caplog.messages:
            await asyncio.sleep(0)
    directory.mkdir()
    await waiting
    assert "not ready (attempt 1 of 1000): OperationalError" in caplog.messages[0]
    await connect.close()


async def test_the_statement_is_run_with_a_limit_and_its_last_error_comes_out(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    statements: list[str] = []
    assert await connect.session_maker()
    assert connect.engine is not None
    event.listen(
        connect.engine.sync_engine,
        "before_cursor_execute",
        lambda *args: statements.append(args[2]),
    )
    await connect.wait_until_ready(select(Item))
    assert "LIMIT" in statements[-1]

    class Missing(Base):
        __tablename__ = "missing"
        id: Mapped[int] = mapped_column(primary_key=True)

    Base.metadata.remove(Base.metadata.tables["missing"])
    with pytest.raises(ProgrammingError, match="missing"):
        await connect.wait_until_ready(select(Missing), attempts=3, delay=0)
    assert len(caplog.messages) == 3


async def test_a_mistake_is_not_waited_for(creators: Creators) -> None:
    with pytest.raises(ValueError, match="host is not set"):
        await DBConnect(creators.engine, creators.session_maker).wait_until_ready()
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    for wrong in ({"attempts": 0}, {"delay": -1.0}):
        with pytest.raises(ValueError, match="attempts must be at least 1, and delay at least 0"):
            await connect.wait_until_ready(**wrong)
