"""The application goes on while its server dies, restarts, or is exchanged for another one."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

import httpx
import psutil
import pytest
from sqlalchemy import URL, make_url, text

from context_async_sqlalchemy import CommitOutcomeUnknownError, DBConnect, db_session
from context_async_sqlalchemy.asgi_types import Receive, Scope, Send
from context_async_sqlalchemy.postgres import keep_on_primary
from tests.helpers.asgi import app_of, respond
from tests.helpers.cluster import PRIMARY_HOST, STANDBY_HOST, primary_and_standby
from tests.helpers.database import Database, assert_clean
from tests.helpers.postgres import free_port, frozen, new_server
from tests.helpers.serving import http_client

CREATE = "CREATE TABLE IF NOT EXISTS number (value int)"


class Load:
    """Writes steadily over HTTP, and notes what the clients were told, and when."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._numbers = itertools.count()
        self.successes: list[int] = []
        self.failures: list[int] = []
        self.errors: list[Exception] = []
        self.began: dict[int, float] = {}
        self.ended: dict[int, float] = {}

    async def write(self) -> None:
        number = next(self._numbers)
        self.began[number] = time.monotonic()
        response = await self._client.post(f"/{number}")
        self.ended[number] = time.monotonic()
        (self.successes if response.status_code == 201 else self.failures).append(number)

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncGenerator[None]:
        """Let `clients` write, one request after another each."""

        async def be_a_client() -> None:
            while not stopped:
                await self.write()
                await asyncio.sleep(0.001)

        stopped = False
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(be_a_client())
            try:
                yield
            finally:
                stopped = True

    async def reaches(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)

    async def all_ended(self, moment: float) -> None:
        """Wait until every request that began before `moment` has ended."""
        before = [number for number, began in self.began.items() if began < moment]
        await self.reaches(lambda: all(number in self.ended for number in before))

    async def writes_more(self, count: int) -> None:
        """Wait until `count` more have been told that they succeeded."""
        wanted = len(self.successes) + count
        await self.reaches(lambda: len(self.successes) >= wanted)


@asynccontextmanager
async def load_on(connect: DBConnect, attempts: int = 1) -> AsyncGenerator[Load]:
    async def handler(scope: Scope) -> int:
        session = await db_session(connect)
        number = int(scope["path"][1:])
        await session.execute(text("INSERT INTO number VALUES (:n)"), {"n": number})
        return 201

    settled = app_of(handler, attempts=attempts)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # uvicorn would close the client's connection, maybe under its next request.
        try:
            await settled(scope, receive, send)
        except Exception as error:
            load.errors.append(error)
            await respond(send, 500)

    async with http_client(app, lifespan="off") as client:
        load = Load(client)
        yield load


@pytest.mark.parametrize(("attempts", "verifies"), [(1, False), (5, False), (5, True)])
async def test_the_application_follows_the_promoted_standby_and_no_success_is_lost(
    attempts: int, verifies: bool, record_property: Callable[[str, object], None]
) -> None:
    with primary_and_standby("on") as (primary, standby):
        primary.psql(CREATE)
        handler = keep_on_primary([PRIMARY_HOST, STANDBY_HOST], check_after=0.1, timeout=1)
        async with (
            DBConnect.from_url(
                primary.url,
                before_create_session_handler=handler,
                verify_commits=verifies,
                verify_timeout=0.5,
            ) as connect,
            load_on(connect, attempts) as load,
            load.running(4),
        ):
            await load.writes_more(50)
            await asyncio.to_thread(primary.kill)
            killed = time.monotonic()
            await asyncio.to_thread(standby.promote)
            promoted = time.monotonic()
            await load.writes_more(200)
            # A COMMIT that was lost is looked up until the deadline.
            await load.all_ended(killed)
            failures = len(load.failures)
            await load.writes_more(200)
            assert len(load.failures) == failures, "errors go on after the first successes"
            assert connect.host == STANDBY_HOST
            assert not connections_to(PRIMARY_HOST, primary.port)
        stored = {row["value"] for row in await standby.fetch("SELECT value FROM number")}

    assert set(load.successes) <= stored
    assert len(load.errors) == len(load.failures)
    if attempts > 1:
        # A COMMIT of which nobody knows whether it took place is not repeated. All else is.
        assert {type(error) for error in load.errors} <= {CommitOutcomeUnknownError}
    back = next(load.ended[n] for n in load.successes if load.began[n] > killed)
    assert back < promoted + 5
    record_property(
        "measured",
        f"failover, attempts={attempts}, verify_commits={verifies}: writes go on"
        f" {back - killed:.2f} s after the death of the primary, promoted in"
        f" {promoted - killed:.2f} s; {len(load.failures)} of {len(load.ended)} requests failed",
    )


def connections_to(host: str, port: int) -> list[str]:
    """Return the state of each connection of this process to a server."""
    return [
        c.status
        for c in psutil.Process().net_connections("tcp")
        if c.raddr and (c.raddr.ip, c.raddr.port) == (host, port)
    ]


async def test_a_planned_switch_fails_no_request_and_leaves_no_connection(
    database_url: URL, database: Database
) -> None:
    await database.execute(f"{CREATE}; TRUNCATE number")
    assert database_url.host == "127.0.0.1"
    try:
        async with (
            DBConnect.from_url(database_url) as connect,
            load_on(connect) as load,
            load.running(8),
        ):
            for host in ("localhost", "127.0.0.1") * 5:
                await load.writes_more(20)
                await connect.change_host(host)
            await load.writes_more(20)
        assert load.failures == []
        stored = [value for (value,) in await database.fetch("SELECT value FROM number")]
        assert sorted(stored) == sorted(load.successes)
        await database.is_left_by_all()
        await assert_clean(connect, database)
    finally:
        await database.execute("DROP TABLE number")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_restart_of_the_server_between_two_requests_fails_none(driver: str) -> None:
    with new_server("127.0.0.1", free_port()) as server:
        server.psql(CREATE)
        url = make_url(server.url).set(drivername=f"postgresql+{driver}")
        async with (
            DBConnect.from_url(url, pool_pre_ping=True, ping_after_idle=0.01) as connect,
            load_on(connect) as load,
        ):
            for _ in range(3):
                await asyncio.gather(*(load.write() for _ in range(5)))
                await asyncio.to_thread(server.restart)
            await asyncio.gather(*(load.write() for _ in range(5)))
        assert (len(load.successes), load.failures) == (20, [])


async def test_the_server_of_a_connect_is_away_for_a_moment_and_retries_bridge_it() -> None:
    with new_server("127.0.0.1", free_port()) as server:
        server.psql(CREATE)
        async with (
            DBConnect.from_url(server.url) as connect,
            load_on(connect, attempts=10) as load,
        ):
            await load.write()
            await asyncio.to_thread(server.stop)
            starting = asyncio.create_task(asyncio.to_thread(server.start))
            await load.write()
            await starting
        assert (len(load.successes), load.failures) == (2, [])
    with suppress(OSError):
        await connect.ping()


async def test_a_silent_host_holds_nobody_up_who_leaves_it() -> None:
    with (
        new_server("127.0.0.1", free_port()) as silent,
        new_server("127.0.0.1", free_port()) as other,
    ):
        connect = DBConnect.from_url(silent.url)
        await asyncio.gather(*(connect.ping() for _ in range(5)))
        with frozen(silent):
            async with asyncio.timeout(10):
                await connect.change_host(f"127.0.0.1:{other.port}")
                await connect.ping()
                # The connections to the silent one are given up at once, not one after another.
                await connect.close()
        assert not connections_to("127.0.0.1", silent.port)


async def test_requests_that_give_up_do_not_keep_the_primary_from_being_found() -> None:
    with (
        new_server("127.0.0.1", free_port()) as silent,
        new_server("127.0.0.1", free_port()) as live,
    ):
        hosts = [f"127.0.0.1:{silent.port}", f"127.0.0.1:{live.port}"]
        handler = keep_on_primary(hosts, check_after=0.01, timeout=0.5)
        async with DBConnect.from_url(silent.url, before_create_session_handler=handler) as connect:
            await connect.change_host(hosts[0])
            with frozen(silent):
                async with asyncio.timeout(10):
                    while connect.host != hosts[1]:
                        with suppress(TimeoutError):
                            await connect.ping(timeout=0.1)
                await connect.ping()
    gc.collect()
