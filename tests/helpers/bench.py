"""A bench on which a request is run again and again, each time with a fault at another point."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from context_async_sqlalchemy import DBConnect, new_db_session_ctx, new_non_ctx_session
from context_async_sqlalchemy.asgi_types import ASGIApp, Message
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, make_connect
from tests.helpers.models import Base, Item
from tests.helpers.proxy import TASK_NAME, Call, Fault, proxy
from tests.helpers.scenarios import (
    SCENARIOS,
    Write,
    add,
    way_to_write,
    write_on_two_engines,
    write_plainly,
)

Connects = tuple[DBConnect, DBConnect]


@dataclass(frozen=True)
class Setting:
    """How a request writes, with which driver, and what it is served by.

    Attributes:
        driver: The driver for PostgreSQL.
        write: How each row is written.
        middleware: A middleware inside ours, or None.
        in_flight: Whether BEGIN, with settings of the transaction, rides with the first statement.
        verified: Whether a lost COMMIT is looked up.
    """

    driver: str = "asyncpg"
    write: Write = write_plainly
    middleware: Any = None
    in_flight: bool = False
    verified: bool = False

    def __str__(self) -> str:
        inside = f"-{self.middleware.__name__}" if self.middleware is not None else ""
        begin = "-in_flight" if self.in_flight else ""
        verified = "-verified" if self.verified else ""
        return f"{self.driver}-{self.write.__name__}{inside}{begin}{verified}"

    def __call__(self, number: int) -> None: ...


class Bench:
    """Runs one scenario, each time with another fault."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting = setting
        self._scenario = SCENARIOS[name]
        self.calls: list[str] = []
        self.fault: tuple[int, object] | None = None
        self.at_call: Callable[[int], None] = lambda _: None
        self.points = 0
        self._engines: list[AsyncEngine] = []

    def app(self, connects: Connects) -> ASGIApp:
        """Make the application of the scenario."""
        return self._scenario.make_app(*connects, self.setting.middleware)

    @asynccontextmanager
    async def connects(self) -> AsyncGenerator[Connects]:
        """Make two connects in whose way a fault can be put."""
        async with AsyncExitStack() as stack:
            stack.callback(way_to_write.reset, way_to_write.set(self.setting.write))
            first, second = await self.open(stack)
            try:
                self.calls.clear()
                yield first, second
            finally:
                self.fault = None
                await first.close()
                await second.close()
                for engine in self._engines:
                    await engine.dispose()
                self._engines.clear()

    async def close_idle(self, connects: Connects) -> None:
        """Close the connections that are in the pools."""
        for engine in (connects[0].engine, connects[1].engine, *self._engines):
            assert engine is not None
            await engine.dispose()
        self.calls.clear()

    async def open(self, stack: AsyncExitStack) -> Connects:
        """Make the connects; what `stack` is given ends with them."""
        raise NotImplementedError

    async def names(self) -> list[str]:
        """Return the names of all rows."""
        raise NotImplementedError

    async def keys(self) -> list[str]:
        """Return what is in the ledger."""
        return []

    async def empty(self) -> None:
        """Delete all rows."""
        raise NotImplementedError

    async def is_clean(self) -> bool:
        """Return whether no connection is in a transaction."""
        return True

    async def check(
        self, connects: Connects, sent: list[Message], tasks: set[asyncio.Task[Any]]
    ) -> None:
        """Check the promise after one run."""
        self.points += 1
        self.fault, self.at_call = None, lambda _: None
        # When a task in a gather() fails, its siblings go on. One of the proxy names itself as it
        # begins.
        with suppress(TimeoutError):
            async with asyncio.timeout(30):
                while left := [
                    task for task in asyncio.all_tasks() - tasks if task.get_name() != TASK_NAME
                ]:
                    await asyncio.sleep(0.001)
        assert not left, "a task is left over"
        self._check_rows(sent, set(await self.names()))
        if self.setting.write is write_on_two_engines:
            keys = await self.keys()
            self._check_rows(sent, set(keys))
            assert max(Counter(keys).values(), default=1) == 1, "what was committed was repeated"

        await self._check_connections(connects)
        await self.empty()
        async with new_db_session_ctx():
            for name, connect in zip("ab", connects, strict=True):
                await add(connect, name)
        assert await self.names() == ["a", "b"], "the next request does not work"
        await self.empty()
        self.calls.clear()

    def _check_rows(self, sent: list[Message], names: set[str]) -> None:
        rows = self._scenario.rows
        told_success = any(m.get("status") == 200 for m in sent)
        whole_body = any(m["type"] == "http.response.body" and not m.get("more_body") for m in sent)
        if told_success:
            assert rows.promised <= names, "told 2xx, and it is not there"
        if whole_body and told_success:
            assert rows.promised_by_body <= names, "told all, and it is not there"
        if not any(call.startswith(("COMMIT", "RELEASE")) for call in self.calls):
            assert not names, "nothing was committed, and something is there"
        assert not names & {"not committed", "not committed either"}
        assert not names or rows.first in {None, *names}
        for group in rows.together:
            assert group & names in (set(), group), "a transaction was torn"

    async def _check_connections(self, connects: Connects) -> None:
        others: list[Any] = [engine.pool for engine in self._engines]

        def out() -> int:
            return sum([connections_out(c) for c in connects] + [p.checkedout() for p in others])

        # It takes the server a moment to notice a connection that was cut.
        try:
            async with asyncio.timeout(30):
                while out() or not await self.is_clean():
                    await asyncio.sleep(0.001)
        except TimeoutError:
            raise AssertionError(f"{out()} connections are out, or in a transaction") from None


class PostgresBench(Bench):
    """Faults are put between the connects and the server."""

    def __init__(self, name: str, setting: Setting, url: URL, database: Database) -> None:
        super().__init__(name, setting)
        self._url = url.set(drivername=f"postgresql+{setting.driver}")
        self._database = database

    async def open(self, stack: AsyncExitStack) -> Connects:
        host, port = self._url.host, self._url.port
        assert host is not None
        assert port is not None
        proxy_port = await stack.enter_async_context(proxy(host, port, self._decide))
        url = self._url.set(host="127.0.0.1", port=proxy_port)
        first, second = self._connect(url), self._connect(url)
        for connect in (first, second):
            # Get the queries that SQLAlchemy sends once per engine out of the way.
            async with new_non_ctx_session(connect) as session:
                await session.connection()
            assert connect.engine is not None
            await connect.engine.dispose()
        for engine in self._engines:
            async with engine.connect():
                pass
            await engine.dispose()
        return first, second

    def _connect(self, url: URL) -> DBConnect:
        # It would look for the type in a transaction of its own, for each connection.
        options = {"use_native_hstore": False} if self.setting.driver == "psycopg" else {}
        if self.setting.in_flight:
            return DBConnect.from_url(
                url,
                begin_with_first_statement=True,
                transaction_settings=lambda: {"app.tenant": "acme"},
            )
        if self.setting.verified:
            return DBConnect.from_url(url, verify_commits=True, pool_size=5)
        if self.setting.write is not write_on_two_engines:
            return make_connect(url, **options)
        other = create_async_engine(url, **options)
        self._engines.append(other)

        class RoutingSession(Session):
            def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
                if mapper is not None and mapper.class_ is Item:
                    return other.sync_engine
                return super().get_bind(mapper, **arguments)

        return DBConnect(
            lambda _: create_async_engine(url, **options),
            lambda engine: async_sessionmaker[AsyncSession](
                engine, sync_session_class=RoutingSession
            ),
            host="that of the URL",
        )

    async def names(self) -> list[str]:
        return await self._database.names()

    async def keys(self) -> list[str]:
        return [key for (key,) in await self._database.fetch("SELECT key FROM ledger")]

    async def empty(self) -> None:
        # Of what is nearly empty, this takes a tenth of the time of a TRUNCATE.
        await self._database.execute("DELETE FROM item; DELETE FROM ledger")

    async def is_clean(self) -> bool:
        return not await self._database.states()

    async def _decide(self, call: Call) -> Fault | None:
        self.calls.append(call.statement)
        number = len(self.calls)
        self.at_call(number)
        if self.fault is None or number != self.fault[0]:
            return None
        fault = self.fault[1]
        if isinstance(fault, Fault):
            return fault
        if call.pid:
            await self._database.terminate(call.pid)
        return None


class SQLiteFault(sqlite3.OperationalError):
    """An error of SQLite, as the disk was full."""

    sqlite_errorcode = 13
    sqlite_errorname = "SQLITE_FULL"


class SQLiteBench(Bench):
    """Faults are put between aiosqlite and SQLite. Each connect has a file, with one writer."""

    def __init__(self, name: str, setting: Setting, directory: Path) -> None:
        super().__init__(name, setting)
        self._files = [directory / "first.db", directory / "second.db"]

    async def open(self, stack: AsyncExitStack) -> Connects:
        connects: list[DBConnect] = [DBConnect.from_url(f"sqlite:///{f}") for f in self._files]
        for connect in connects:
            await connect.session_maker()
            assert connect.engine is not None
            async with connect.engine.begin() as connection:
                await connection.run_sync(Base.metadata.tables["item"].create, checkfirst=True)
            await connect.engine.dispose()
            event.listen(connect.engine.sync_engine, "connect", self._intercept, insert=True)
        return connects[0], connects[1]

    async def names(self) -> list[str]:
        return [name for file in self._files for name in self._run(file, "SELECT name FROM item")]

    async def empty(self) -> None:
        for file in self._files:
            self._run(file, "DELETE FROM item")

    def _run(self, file: Path, statement: str) -> list[str]:
        # Who still holds the lock has been left over: it fails.
        with closing(sqlite3.connect(file, timeout=10, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            return [name for (name,) in connection.execute(statement)]

    def _intercept(self, connection: Any, _: object) -> None:
        driver: Any = connection.driver_connection
        execute = driver._execute  # each call of the sqlite3 module goes through it

        async def intercepted(function: Any, *arguments: Any, **options: Any) -> Any:
            name = getattr(function, "__name__", "")
            if name not in ("execute", "executemany", "commit", "rollback"):
                return await execute(function, *arguments, **options)
            statement = arguments[0] if name.startswith("execute") else name.upper()
            self.calls.append(statement)
            number = len(self.calls)
            self.at_call(number)
            if self.fault is None or number != self.fault[0]:
                return await execute(function, *arguments, **options)
            if self.fault[1] == "ended":
                await execute(driver._conn.rollback)
            raise SQLiteFault("injected")

        driver._execute = intercepted
