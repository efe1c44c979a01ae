"""Handlers that choose the host, on a real primary with a real standby."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from context_async_sqlalchemy.postgres import Handler, keep_on_primary, keep_on_replica
from tests.helpers.cluster import PRIMARY_HOST, STANDBY_HOST, primary_and_standby
from tests.helpers.connections import connections_out
from tests.helpers.postgres import Server, free_port, frozen

HOSTS = [PRIMARY_HOST, STANDBY_HOST]


@pytest.fixture(scope="module")
def servers() -> Generator[tuple[Server, Server]]:
    with primary_and_standby() as (primary, standby):
        primary.psql("CREATE TABLE item (id int)")
        yield primary, standby


class Cluster:
    """A connect to the cluster that counts the engines made for it."""

    def __init__(self, primary: Server, handler: Handler, host: str | None) -> None:
        self.engines: Counter[str] = Counter()

        def engine_creator(host: str) -> AsyncEngine:
            self.engines[host] += 1
            return create_async_engine(make_url(primary.url).set(host=host))

        self.connect = DBConnect(engine_creator, async_sessionmaker, host, handler)

    async def is_on_replica(self) -> bool:
        async with new_non_ctx_session(self.connect) as session:
            answer = await session.scalar(text("SELECT pg_is_in_recovery()"))
        assert isinstance(answer, bool)
        return answer

    async def becomes(self, *, replica: bool) -> None:
        async with asyncio.timeout(20):
            while await self.is_on_replica() is not replica:
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def make_cluster(servers: tuple[Server, Server]) -> AsyncGenerator[Any]:
    clusters: list[Cluster] = []

    def make(handler: Handler, host: str | None = None) -> Cluster:
        clusters.append(Cluster(servers[0], handler, host))
        return clusters[-1]

    yield make
    for cluster in clusters:
        assert connections_out(cluster.connect) == 0
        await cluster.connect.close()


@pytest.mark.parametrize("host", [None, *HOSTS])
async def test_the_primary_is_found(make_cluster: Any, host: str | None) -> None:
    cluster = make_cluster(keep_on_primary(HOSTS), host)
    assert not await cluster.is_on_replica()
    assert cluster.connect.host == PRIMARY_HOST


@pytest.mark.parametrize("host", [None, *HOSTS])
async def test_a_replica_is_found(make_cluster: Any, host: str | None) -> None:
    cluster = make_cluster(keep_on_replica(HOSTS, check_after=0.01), host)
    await cluster.becomes(replica=True)  # at once, unless another test has just restarted it
    assert cluster.connect.host == STANDBY_HOST


async def test_a_host_that_was_found_is_not_asked_again_for_a_while(make_cluster: Any) -> None:
    cluster = make_cluster(keep_on_primary(HOSTS, check_after=60, timeout=20), PRIMARY_HOST)
    await asyncio.gather(*(cluster.is_on_replica() for _ in range(20)))
    # One to ask it, and the one that is used.
    assert cluster.engines == {PRIMARY_HOST: 2}


async def test_a_host_that_was_found_is_asked_again_after_a_while(make_cluster: Any) -> None:
    cluster = make_cluster(keep_on_primary(HOSTS, check_after=0.01, timeout=20), PRIMARY_HOST)
    async with asyncio.timeout(30):
        while cluster.engines[PRIMARY_HOST] < 4:
            await cluster.is_on_replica()
    assert cluster.engines[STANDBY_HOST] == 0


async def test_asking_leaves_no_connection(
    make_cluster: Any, servers: tuple[Server, Server]
) -> None:
    cluster = make_cluster(keep_on_primary(HOSTS, check_after=0.001), STANDBY_HOST)
    for _ in range(5):
        await cluster.is_on_replica()
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    async with asyncio.timeout(30):
        while [(await server.fetch(query))[0]["count"] for server in servers] != [1, 0]:
            await asyncio.sleep(0.01)


async def test_a_replica_that_falls_behind_is_left_until_it_has_caught_up(
    make_cluster: Any, servers: tuple[Server, Server]
) -> None:
    primary, standby = servers
    cluster = make_cluster(keep_on_replica(HOSTS, max_lag=0.2, check_after=0.01))
    await cluster.becomes(replica=True)
    await standby.fetch("SELECT pg_wal_replay_pause()")
    try:
        await primary.fetch("INSERT INTO item VALUES (1)")
        await cluster.becomes(replica=False)
    finally:
        await standby.fetch("SELECT pg_wal_replay_resume()")
    await cluster.becomes(replica=True)


async def test_a_replica_that_is_down_is_replaced_by_the_primary(
    make_cluster: Any, servers: tuple[Server, Server]
) -> None:
    _, standby = servers
    cluster = make_cluster(keep_on_replica(HOSTS, check_after=0.01))
    await cluster.becomes(replica=True)
    await asyncio.to_thread(standby.stop)
    try:
        await cluster.becomes(replica=False)
    finally:
        await asyncio.to_thread(standby.start)
    await cluster.becomes(replica=True)


async def test_without_a_primary_the_connect_stays_and_its_errors_come_through(
    make_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "context_async_sqlalchemy")
    cluster = make_cluster(keep_on_primary([STANDBY_HOST, "127.0.0.3"], check_after=0.01))
    assert await cluster.is_on_replica()
    assert cluster.connect.host == STANDBY_HOST
    assert f"None of the hosts {STANDBY_HOST}, 127.0.0.3 is a primary" in caplog.text
    assert "The host 127.0.0.3 does not say what it is: ConnectionRefusedError" in caplog.text


async def test_a_host_that_is_silent_is_given_up(make_cluster: Any) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client hangs up
        writer.close()
        left.set()

    left = asyncio.Event()
    silent = await asyncio.start_server(say_nothing, "127.0.0.1")
    port = silent.sockets[0].getsockname()[1]
    cluster = make_cluster(keep_on_primary(HOSTS))
    url = make_url((await cluster.connect.create_engine(PRIMARY_HOST)).url)
    handler = keep_on_primary([f"127.0.0.1:{port}", f"{PRIMARY_HOST}:{url.port}"], timeout=1)
    async with DBConnect.from_url(
        url.set(port=port), before_create_session_handler=handler
    ) as connect:
        await connect.ping(timeout=30)
        assert connect.host == f"{PRIMARY_HOST}:{url.port}"
    await left.wait()
    silent.close()
    await silent.wait_closed()


async def test_nobody_waits_for_a_replica_while_the_primary_serves(
    make_cluster: Any, servers: tuple[Server, Server]
) -> None:
    _, standby = servers
    cluster = make_cluster(keep_on_replica(HOSTS, check_after=0.01, timeout=2))
    with frozen(standby):
        await cluster.becomes(replica=False)
        longest = 0.0
        for _ in range(50):
            began = asyncio.get_running_loop().time()
            await cluster.is_on_replica()
            longest = max(longest, asyncio.get_running_loop().time() - began)
            await asyncio.sleep(0.02)
        assert longest < 1.5  # a check takes 2 seconds
    await cluster.becomes(replica=True)


async def test_hosts_that_are_urls_are_logged_without_their_passwords(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "context_async_sqlalchemy")
    url = f"postgresql+asyncpg://app:hunter2@127.0.0.1:{free_port()}/shop"
    handler = keep_on_primary([url])
    async with DBConnect(create_async_engine, async_sessionmaker, url, handler) as connect:
        with pytest.raises(ConnectionRefusedError):
            await connect.ping()
    assert "app:***@127.0.0.1" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("make", [keep_on_primary, keep_on_replica])
def test_bad_arguments_are_refused_at_once(make: Any) -> None:
    with pytest.raises(TypeError, match="a list of hosts, not one string"):
        make("db1")
    for hosts in ([], ["db1", ""]):
        with pytest.raises(ValueError, match="hosts must not be empty"):
            make(hosts)
    for name in ("check_after", "timeout"):
        with pytest.raises(ValueError, match=f"{name} must be more than 0 seconds, not 0"):
            make(["db1"], **{name: 0})
    with pytest.raises(ValueError, match="max_lag must be more than 0 seconds, not -1"):
        keep_on_replica(["db1"], max_lag=-1)
