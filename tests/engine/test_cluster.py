"""The servers that the tests of a failover run on do what they say."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import asyncpg
import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.helpers.cluster import primary_and_standby
from tests.helpers.pgbouncer import CONNECT_ARGS, pgbouncer, pgbouncer_binary
from tests.helpers.postgres import Server, free_port, new_server

CREATE, INSERT = "CREATE TABLE item (id int PRIMARY KEY)", "INSERT INTO item VALUES ($1)"
SELECT = "SELECT id FROM item ORDER BY id"


async def ids(server: Server) -> list[int]:
    return [row["id"] for row in await server.fetch(SELECT)]


async def test_a_standby_follows_the_primary_and_refuses_writes() -> None:
    with primary_and_standby() as (primary, standby):
        await primary.fetch(CREATE)
        async with asyncio.timeout(5):
            while not await standby.fetch("SELECT FROM pg_class WHERE relname = 'item'"):
                await asyncio.sleep(0.01)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await standby.fetch(INSERT, 1)


async def test_a_commit_with_remote_apply_is_seen_on_the_standby() -> None:
    with primary_and_standby("remote_apply") as (primary, standby):
        await primary.fetch(CREATE)
        for number in range(20):
            await primary.fetch(INSERT, number)
            assert await ids(standby) == list(range(number + 1))


async def test_a_synchronous_commit_waits_for_the_standby() -> None:
    with primary_and_standby("on") as (primary, standby):
        await primary.fetch(CREATE)
        standby.kill()
        insert = asyncio.create_task(primary.fetch(INSERT, 1))
        async with asyncio.timeout(5):
            while not await primary.fetch(
                "SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            ):
                await asyncio.sleep(0.01)
        assert not insert.done()
        standby.start()
        await insert
        assert await ids(primary) == [1]


async def test_a_promoted_standby_has_every_row_that_the_killed_primary_acknowledged() -> None:
    acknowledged: list[int] = []

    async def insert_until_lost(primary: Server, first: int) -> None:
        with suppress(Exception):  # asyncpg has many words for a lost connection
            for number in range(first, 1_000_000, 4):
                await primary.fetch(INSERT, number)
                acknowledged.append(number)

    with primary_and_standby("on") as (primary, standby):
        await primary.fetch(CREATE)
        async with asyncio.TaskGroup() as tasks:
            writers = [tasks.create_task(insert_until_lost(primary, n)) for n in range(4)]
            while len(acknowledged) < 50:
                assert not any(writer.done() for writer in writers)
                await asyncio.sleep(0.01)
            await asyncio.to_thread(primary.kill)
        with pytest.raises(ConnectionRefusedError):
            await primary.fetch(SELECT)

        standby.promote()
        await standby.fetch(INSERT, -1)
        assert {-1, *acknowledged} <= set(await ids(standby))

        primary.start()
        assert set(acknowledged) <= set(await ids(primary))


async def test_a_server_that_restarts_keeps_its_rows_and_its_port() -> None:
    with new_server("127.0.0.1", free_port()) as server:
        await server.fetch(CREATE)
        await server.fetch(INSERT, 1)
        server.restart()
        await server.fetch(INSERT, 2)
        server.stop()
        server.start()
        await server.fetch(INSERT, 3)
        server.kill()
        server.start()
        assert await ids(server) == [1, 2, 3]


@pytest.mark.skipif(
    pgbouncer_binary() is None, reason="pgbouncer is not installed: apt-get install pgbouncer"
)
async def test_transactions_through_pgbouncer_share_its_connections(database_url: URL) -> None:
    with pgbouncer(database_url, default_pool_size=3) as url:
        engine = create_async_engine(url, pool_size=20, connect_args=CONNECT_ARGS)

        async def pid() -> int:
            async with engine.connect() as connection:
                pid: int = await connection.scalar(text("SELECT pg_backend_pid()"))
                return pid

        pids = await asyncio.gather(*(pid() for _ in range(20)))
        await engine.dispose()
    assert len(set(pids)) <= 3
