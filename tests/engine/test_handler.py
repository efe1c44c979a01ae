"""The handler before a session: the session is on the host that its own handler has left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.mocks import Creators

tenant: ContextVar[str] = ContextVar("tenant")
NAMES = ["ann", "bob", "cid", "dan", "eve"]


class Tenants:
    """A database for each name, and what a session on it says it is."""

    def __init__(self, driver: str, url: URL, directory: Path) -> None:
        self._url = url.set(drivername=driver)
        self._directory = directory
        self.engines: list[AsyncEngine] = []

    def engine(self, name: str) -> AsyncEngine:
        settings: dict[str, Any] = {"application_name": name}
        url = self._url
        if url.drivername == "postgresql+asyncpg":
            settings = {"server_settings": settings}
        elif url.get_backend_name() == "sqlite":
            url, settings = URL.create(url.drivername, database=f"{self._directory}/{name}"), {}
        self.engines.append(create_async_engine(url, connect_args=settings))
        return self.engines[-1]

    def connect(self, handler: Callable[[DBConnect], Awaitable[None]]) -> DBConnect:
        return DBConnect(self.engine, async_sessionmaker, before_create_session_handler=handler)

    async def ask(self, connect: DBConnect) -> str:
        """Return the name of the database that the session of the context talks to."""
        session = await db_session(connect)
        if self._url.get_backend_name() == "sqlite":
            query = "SELECT file FROM pragma_database_list WHERE name = 'main'"
        else:
            query = "SELECT current_setting('application_name')"
        return Path((await session.execute(text(query))).scalar_one()).name

    async def asked_by(self, connect: DBConnect, name: str) -> str:
        tenant.set(name)
        return await run_in_new_ctx(self.ask, connect)

    async def assert_left(self, connect: DBConnect, database: Database) -> None:
        assert connections_out(connect) == 0
        await connect.close()
        await database.is_left_by_all()
        assert [e.pool.checkedout() for e in self.engines] == [0] * len(self.engines)  # type: ignore[attr-defined]


@pytest.fixture(params=["postgresql+asyncpg", "postgresql+psycopg", "sqlite+aiosqlite"])
def tenants(request: pytest.FixtureRequest, database_url: URL, tmp_path: Path) -> Tenants:
    return Tenants(request.param, database_url, tmp_path)


async def changes(connect: DBConnect) -> None:
    await connect.change_host(tenant.get())


async def changes_if_it_is_another(connect: DBConnect) -> None:
    if connect.host != tenant.get():
        await connect.change_host(tenant.get())


async def connects(connect: DBConnect) -> None:
    await connect.connect(tenant.get())


async def assigns(connect: DBConnect) -> None:
    connect.host = tenant.get()


async def changes_in_a_child_task(connect: DBConnect) -> None:
    await asyncio.create_task(connect.change_host(tenant.get()))


async def changes_in_a_thread(connect: DBConnect) -> None:
    await asyncio.to_thread(asyncio.run, connect.change_host(tenant.get()))


async def assigns_in_a_thread(connect: DBConnect) -> None:
    await asyncio.to_thread(setattr, connect, "host", tenant.get())


HANDLERS = [
    *(changes, changes_if_it_is_another, connects, assigns),
    *(changes_in_a_child_task, changes_in_a_thread, assigns_in_a_thread),
]


@pytest.mark.parametrize("handler", HANDLERS)
async def test_a_hundred_tasks_are_each_on_the_database_of_their_tenant(
    handler: Callable[[DBConnect], Awaitable[None]], tenants: Tenants, database: Database
) -> None:
    connect = tenants.connect(handler)
    names = NAMES * 20
    assert await asyncio.gather(*(tenants.asked_by(connect, n) for n in names)) == names
    await tenants.assert_left(connect, database)


@pytest.mark.parametrize("handler", HANDLERS)
async def test_a_handler_may_wait_while_others_change_the_host(
    handler: Callable[[DBConnect], Awaitable[None]], tenants: Tenants, database: Database
) -> None:
    arrived: set[str] = set()
    changed = asyncio.Event()

    async def change_and_wait(connect: DBConnect) -> None:
        await handler(connect)
        arrived.add(tenant.get())
        if len(arrived) == len(NAMES):
            changed.set()
        await changed.wait()

    connect = tenants.connect(change_and_wait)
    async with asyncio.timeout(30):
        assert await asyncio.gather(*(tenants.asked_by(connect, n) for n in NAMES)) == NAMES
    await tenants.assert_left(connect, database)


async def test_what_a_handler_has_left_holds_while_an_engine_is_made(creators: Creators) -> None:
    is_making, may_go_on = asyncio.Event(), asyncio.Event()

    async def make_slowly(host: str) -> AsyncEngine:
        is_making.set()
        await may_go_on.wait()
        return creators.engine(host)

    async def assign(connect: DBConnect) -> None:
        connect.host = "a"

    connect = DBConnect(make_slowly, creators.session_maker, before_create_session_handler=assign)
    making: asyncio.Task[Any] = asyncio.create_task(connect.create_session())
    await is_making.wait()
    connect.host = "b"
    may_go_on.set()
    assert (await making).engine is creators.engines["a"][0]


@pytest.mark.parametrize("reads", [False, True])
async def test_a_host_that_a_handler_reads_holds_and_one_that_it_does_not_is_the_latest(
    reads: bool, creators: Creators
) -> None:
    is_making, may_go_on = asyncio.Event(), asyncio.Event()

    async def make_slowly(host: str) -> AsyncEngine:
        is_making.set()
        await may_go_on.wait()
        return creators.engine(host)

    async def look(connect: DBConnect) -> None:
        assert not reads or connect.host == "a"

    connect = DBConnect(make_slowly, creators.session_maker, "a", look)
    changing = asyncio.create_task(connect.connect("b"))
    await is_making.wait()
    making: asyncio.Task[Any] = asyncio.create_task(connect.create_session())
    await asyncio.sleep(0)  # it waits for the engine that is made now
    may_go_on.set()
    await changing
    session = await making
    assert session.engine is creators.engines["a" if reads else "b"][0]


async def test_a_handler_that_sees_its_host_replaced_runs_again(creators: Creators) -> None:
    seen: list[str | None] = []
    looks, has_changed = asyncio.Event(), asyncio.Event()

    async def look_and_wait(connect: DBConnect) -> None:
        seen.append(connect.host)
        looks.set()
        await has_changed.wait()

    connect = DBConnect(creators.engine, creators.session_maker, "a", look_and_wait)
    making: asyncio.Task[Any] = asyncio.create_task(connect.create_session())
    await looks.wait()
    await connect.change_host("b")
    has_changed.set()
    session = await making
    assert seen == ["a", "b"]
    assert session.engine is creators.engines["b"][0]


async def test_a_handler_that_leaves_the_switch_to_a_shared_task_gets_its_host(
    creators: Creators,
) -> None:
    switches: list[asyncio.Task[None]] = []

    async def fail_over(connect: DBConnect) -> None:
        if not switches:
            switches.append(asyncio.create_task(connect.change_host("standby")))
        await asyncio.shield(switches[0])

    connect = DBConnect(creators.engine, creators.session_maker, "primary", fail_over)
    made: list[Any] = await asyncio.gather(*(connect.create_session() for _ in range(10)))
    [standby] = creators.engines["standby"]
    assert all(session.engine is standby for session in made)


async def test_a_handler_that_sets_no_host_follows_the_connect(creators: Creators) -> None:
    async def do_nothing(_: DBConnect) -> None:
        await asyncio.sleep(0)

    connect = DBConnect(creators.engine, creators.session_maker, "a", do_nothing)
    first: Any = await connect.create_session()
    await connect.change_host("b")
    second: Any = await connect.create_session()
    assert first.engine is creators.engines["a"][0]
    assert second.engine is creators.engines["b"][0]


async def test_a_task_that_outlives_its_handler_changes_the_host_for_all(
    creators: Creators,
) -> None:
    may_change = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def monitor(connect: DBConnect) -> None:
        await may_change.wait()
        await connect.change_host("b")
        # Its own sessions are on the host of the connect, too.
        session: Any = await connect.create_session()
        assert session.engine is creators.engines["b"][0]

    async def start_monitor(connect: DBConnect) -> None:
        if not tasks:
            tasks.append(asyncio.create_task(monitor(connect)))

    connect = DBConnect(creators.engine, creators.session_maker, "a", start_monitor)
    first: Any = await connect.create_session()
    assert first.engine is creators.engines["a"][0]
    may_change.set()
    await tasks[0]
    session: Any = await connect.create_session()
    assert session.engine is creators.engines["b"][0]


async def test_a_handler_may_make_a_session_of_another_connect(
    tenants: Tenants, database: Database
) -> None:
    inner = tenants.connect(changes)

    async def look_up(connect: DBConnect) -> None:
        name = tenant.get()
        await connect.change_host(name)
        assert await tenants.asked_by(inner, f"{name}-directory") == f"{name}-directory"
        tenant.set(name)

    connect = tenants.connect(look_up)
    names = NAMES * 2
    assert await asyncio.gather(*(tenants.asked_by(connect, n) for n in names)) == names
    await inner.close()
    await tenants.assert_left(connect, database)


@pytest.mark.parametrize("error", [RuntimeError("the directory is down"), asyncio.CancelledError()])
async def test_a_handler_that_fails_after_a_change_leaves_no_session_and_no_connection(
    error: BaseException, tenants: Tenants, database: Database
) -> None:
    async def change_and_fail(connect: DBConnect) -> None:
        await connect.change_host(tenant.get())
        if tenant.get() == "bob":
            raise error

    connect = tenants.connect(change_and_fail)
    answers = await asyncio.gather(
        *(tenants.asked_by(connect, n) for n in NAMES * 4), return_exceptions=True
    )
    assert all(
        isinstance(answer, type(error)) if name == "bob" else answer == name
        for name, answer in zip(NAMES * 4, answers, strict=True)
    )
    await tenants.assert_left(connect, database)


async def test_handlers_that_are_cancelled_at_any_moment_leave_no_connection(
    database_url: URL, tmp_path: Path, database: Database
) -> None:
    # psycopg and aiosqlite forget a connection whose opening is cancelled, here and elsewhere.
    tenants = Tenants("postgresql+asyncpg", database_url, tmp_path)
    connect = tenants.connect(changes)
    for steps in range(25):
        asked = [asyncio.create_task(tenants.asked_by(connect, n)) for n in NAMES[:3]]
        for _ in range(steps):
            await asyncio.sleep(0)
        asked[0].cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers[1:] == NAMES[1:3]
        assert answers[0] == "ann" or isinstance(answers[0], asyncio.CancelledError)
    await tenants.assert_left(connect, database)


async def test_a_change_that_fails_is_not_taken_for_one(creators: Creators) -> None:
    def make(host: str) -> AsyncEngine:
        if host == "down":
            raise OSError("no route")
        return creators.engine(host)

    async def try_another(connect: DBConnect) -> None:
        for host in "b", "down":
            with suppress(OSError):
                await connect.change_host(host)

    connect = DBConnect(make, creators.session_maker, "a", try_another)
    session: Any = await connect.create_session()
    assert session.engine is creators.engines["b"][0]
    assert connect.host == "b"


async def test_each_event_loop_has_its_own_engine_for_the_host_of_a_handler(
    tenants: Tenants, database: Database
) -> None:
    connect = tenants.connect(changes)
    answers: dict[str, list[str]] = {}

    async def ask_often(name: str) -> list[str]:
        return [await tenants.asked_by(connect, name) for _ in range(20)]

    async def ask_and_close(name: str) -> None:
        answers[name] = await ask_often(name)
        await connect.close()

    threads = [
        threading.Thread(target=asyncio.run, args=(ask_and_close(name),)) for name in NAMES[1:3]
    ]
    for thread in threads:
        thread.start()
    assert await ask_often("ann") == ["ann"] * 20
    for thread in threads:
        await asyncio.to_thread(thread.join, 30)
    assert answers == {name: [name] * 20 for name in NAMES[1:3]}
    await connect.close()


async def test_a_test_keeps_its_transaction_whatever_its_handler_chooses(
    database_url: URL, tmp_path: Path, database: Database
) -> None:
    tenants = Tenants("postgresql+asyncpg", database_url, tmp_path)
    connect = tenants.connect(changes)
    tenant.set("ann")
    async with shared_transaction(connect):
        for name in NAMES:
            tenant.set(name)
            async with new_db_session_ctx():
                assert await tenants.ask(connect) == "ann"
    async with new_non_ctx_session(connect) as session:
        await session.execute(text("SELECT 1"))
    assert await tenants.asked_by(connect, "bob") == "bob"
    await tenants.assert_left(connect, database)
