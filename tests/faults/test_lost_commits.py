"""A COMMIT whose connection is lost while a standby is slow, or takes over without it."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    db_session,
    new_db_session_ctx,
)
from tests.helpers.cluster import primary_and_standby
from tests.helpers.flight import TRANSACTION
from tests.helpers.postgres import Server, frozen, use_again
from tests.helpers.proxy import Call, Fault, proxy
from tests.helpers.raw import raw_of

CREATE = "CREATE TABLE number (value int)"
WAITS = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


async def write(connect: DBConnect, value: int, begun: list[Any]) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(text("INSERT INTO number VALUES (:value)"), {"value": value})
        begun.append(await raw_of(session))


async def lose(connect: DBConnect, primary: Server, value: int, how: str) -> asyncio.Task[None]:
    """Begin a commit, and lose its connection while it waits for the standby."""
    begun: list[asyncpg.Connection] = []
    writing = asyncio.create_task(write(connect, value, begun))
    async with asyncio.timeout(20):
        while not (waiting := await asyncio.to_thread(primary.psql, WAITS)):
            await asyncio.sleep(0.01)
    if how == "cut":
        begun[0].terminate()
    else:  # PostgreSQL gives the waiting up, and keeps what was committed
        primary.psql(f"SELECT pg_terminate_backend({waiting}, 5000)")
    return writing


async def test_a_commit_that_waits_for_a_standby_is_waited_for() -> None:
    with primary_and_standby("on") as (primary, standby):
        primary.psql(CREATE)
        async with (
            DBConnect.from_url(primary.url, verify_commits=True) as connect,
            DBConnect.from_url(primary.url, verify_commits=True, verify_timeout=0.3) as hurried,
        ):
            for value, how in enumerate(["cut", "terminated"]):
                with frozen(standby):
                    writing = await lose(hurried, primary, value, how)
                    with pytest.raises(CommitOutcomeUnknownError):
                        await writing
                async with asyncio.timeout(20):
                    while await asyncio.to_thread(primary.psql, WAITS):
                        await asyncio.sleep(0.01)
                with frozen(standby):
                    writing = await lose(connect, primary, 10 + value, how)
                    done, _ = await asyncio.wait([writing], timeout=0.3)
                    assert not done, "no standby has it yet"
                await writing
        async with (
            DBConnect.from_url(standby.url, verify_commits=True) as reading,
            new_db_session_ctx(),
        ):
            assert await (await db_session(reading)).scalar(text("SELECT pg_is_in_recovery()"))
        assert primary.psql("SELECT count(*) FROM number WHERE value >= 10") == "2"


async def test_after_a_failover_the_commit_of_another_transaction_is_not_taken_for_it() -> None:
    with primary_and_standby() as (primary, standby):
        primary.psql(CREATE)
        lost: list[str] = []
        target = [primary.host, primary.port]

        async def decide(call: Call) -> Fault | None:
            if lost and call.statement.startswith("COMMIT"):
                target[:] = [standby.host, standby.port]
                return Fault.LOST_AFTER
            return None

        def fail_over() -> None:
            assert primary.psql(f"SELECT pg_xact_status('{lost[0]}'::xid8)") == "committed"
            primary.kill()
            standby.start()
            standby.promote()
            use_again(standby, lost[0], "INSERT INTO number VALUES (2)")

        async def lead() -> asyncpg.Connection:
            # As an address does that is moved to the new primary.
            if target[0] == standby.host:
                await asyncio.to_thread(fail_over)
            return await asyncpg.connect(
                host=target[0], port=target[1], user="postgres", database="postgres"
            )

        async with proxy(primary.host, primary.port, decide) as port:
            target[:] = ["127.0.0.1", port]
            async with DBConnect.from_url(
                primary.url, async_creator=lead, verify_commits=True, verify_timeout=20
            ) as connect:
                await connect.ping()
                await asyncio.to_thread(standby.stop)
                with pytest.raises(CommitOutcomeUnknownError):
                    async with new_db_session_ctx():
                        session = await db_session(connect)
                        await session.execute(text("INSERT INTO number VALUES (1)"))
                        lost += await session.scalars(TRANSACTION)
        assert standby.psql("SELECT count(*) FROM number WHERE value = 1") == "0"
