"""DBConnect: an engine and its sessionmaker, lazily, and the host they talk to."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Generic, NoReturn, Self, Unpack

from sqlalchemy import URL, Executable, Select, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from context_async_sqlalchemy._engine.border import real_session
from context_async_sqlalchemy._engine.checks import check_callable, check_host, check_threshold
from context_async_sqlalchemy._engine.engines import Engines, SessionMaker
from context_async_sqlalchemy._engine.from_url import creators_from_url
from context_async_sqlalchemy._engine.lazy_session_maker import LazySessionMaker
from context_async_sqlalchemy._engine.log import hide_password
from context_async_sqlalchemy._engine.options import SessionT, SessionT_co, URLOptions
from context_async_sqlalchemy._engine.pool import PoolStatus, pool_status
from context_async_sqlalchemy._engine.readiness import until_ready
from context_async_sqlalchemy._engine.release import close_sessions
from context_async_sqlalchemy._engine.shield import result_within
from context_async_sqlalchemy._engine.sqlite import check_foreign_keys_at_commit

_numbers = itertools.count(1)


class ConnectOptions(URLOptions[SessionT], total=False):
    """The options of `DBConnect.from_url`, which describes them."""

    before_create_session_handler: Callable[[DBConnect[Any]], Awaitable[None]] | None
    leak_detection_threshold: float | None


class DBConnect(Generic[SessionT_co]):
    """One database as the application sees it.

    Make it at import time: nothing is opened until a session is asked for. An engine belongs to the
    event loop that made it; on another loop the connect makes another one. `async with` closes it.
    A copy of it (`copy.deepcopy`) is a connect of its own: it makes its own engines and sessions.
    What makes an engine raises `TypeError` if a creator returns something that cannot be used, and
    `ValueError` if there is no host, or an empty one.

    Args:
        engine_creator: Called with the host; returns the `AsyncEngine` for it. May be an async
            function, such as one that fetches an access token.
        session_maker_creator: Called with that engine; returns its `async_sessionmaker`. May be an
            async function.
        host: The host to talk to. Default None: `before_create_session_handler` sets it.
        before_create_session_handler: Awaited with this connect before each session is made, which
            is on the host that it sets (`change_host`), or else reads. It is awaited again if
            another task changes a host that it has only read. Default None.
        leak_detection_threshold: Log a warning when the session of a context holds a connection for
            longer than this, in seconds. The warning names the request, and the line or the
            endpoint that asked for the session. Default None: do not watch.

    Attributes:
        context_key: The key of this connect's session in a context; unique in the process.
        leak_detection_threshold: The argument.

    Raises:
        TypeError: If a creator or the handler is not callable.
        ValueError: If `host` is empty, or `leak_detection_threshold` is not a positive number.
    """

    def __init__(
        self,
        engine_creator: Callable[[str], Awaitable[AsyncEngine] | AsyncEngine],
        session_maker_creator: Callable[
            [AsyncEngine],
            Awaitable[async_sessionmaker[SessionT_co]] | async_sessionmaker[SessionT_co],
        ],
        host: str | None = None,
        before_create_session_handler: Callable[[DBConnect[Any]], Awaitable[None]] | None = None,
        *,
        leak_detection_threshold: float | None = None,
    ) -> None:
        if before_create_session_handler is not None:
            check_callable("before_create_session_handler", before_create_session_handler)
        check_threshold(leak_detection_threshold)
        self.context_key = f"connect-{next(_numbers)}"
        self.leak_detection_threshold = leak_detection_threshold
        self._engines = Engines(engine_creator, session_maker_creator, host)
        self._before_create_session_handler = before_create_session_handler

    @classmethod
    def from_url(
        cls,
        url: str | URL,
        password: str | None = None,
        **options: Unpack[ConnectOptions[SessionT_co]],
    ) -> DBConnect[SessionT_co]:
        """Make a connect for a database URL; opens nothing.

            connect = DBConnect.from_url("postgresql://app@db.example.com/shop", password)

        PostgreSQL with asyncpg: the query of the URL may have what is in the URLs of hosted
        databases: `sslmode`, `sslrootcert`, `options`, `connect_timeout` and others of libpq's.
        Only `sslmode=verify-full` verifies the server; asyncpg has no channel binding.

        SQLite: savepoints, reads and DDL belong to the transaction; foreign keys are enforced; a
        writer waits up to 5 seconds for another one. A transaction that reads before it writes
        cannot wait, unless `connect_args={"isolation_level": "IMMEDIATE"}` lets it begin with the
        lock. A database in memory has one connection: one session at a time uses it, others wait.

        Args:
            url: A string, or a `sqlalchemy.URL`. Without a driver, `postgresql` (or `postgres`)
                gets asyncpg, `sqlite` aiosqlite, `mysql` and `mariadb` asyncmy.
            password: The password, not percent-encoded. Default None: the one in the URL.
            **options: Those of `sqlalchemy.create_engine()` that are of use here, with its
                defaults: `pool_size`, `pool_timeout`, `echo`, `connect_args` and so on; and:

                - `before_create_session_handler`, `leak_detection_threshold`: As for `DBConnect`.
                  `change_host` replaces the host of the URL, and with "host:port" its port.
                - `hide_parameters`: Keep parameters out of errors. Default True; False with `echo`.
                - `session_options`: What `async_sessionmaker` takes, such as a `class_` of your
                  own; `expire_on_commit` is False unless it is given here. Default None.
                - `ping_after_idle`: Seconds of no use before `pool_pre_ping` pings. Default 1.
                - `idle_timeout`: Close a connection that was idle for longer than this, in seconds.
                  The pool then hands out the one that was used last. Default None: never.
                - `min_idle`: How many idle connections `idle_timeout` leaves open. Default 0.
                - `max_waiting`: How many may wait for a connection at a time. Default None: any.
                - `transaction_settings`: Called at each BEGIN of PostgreSQL: settings by name.
                - `begin_with_first_statement`: In one round trip, with asyncpg. Default False.
                - `verify_commits`: Look up a lost COMMIT (`verify_timeout`: 5 s). Default False.

        Raises:
            ModuleNotFoundError: If the driver is not installed.
            TypeError: If an option is unknown, or of the wrong type.
            ValueError: If the URL cannot be read, its driver is not async, or an option is invalid.
        """
        handler = options.pop("before_create_session_handler", None)
        threshold = options.pop("leak_detection_threshold", None)
        creators = creators_from_url(url, password, options)
        connect = cls(*creators, handler, leak_detection_threshold=threshold)
        connect._engines.needs_host = False
        return connect

    def __repr__(self) -> str:
        # The host may be a whole URL, if that is what the engine_creator takes.
        host = hide_password(self.host) if self.host is not None else None
        return f"<DBConnect {self.context_key} host={host!r}>"

    def __copy__(self, _: object = None) -> Self:
        """Return a connect of its own, with what this one was made from, and the same host."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        copied.context_key = f"connect-{next(_numbers)}"
        copied._engines = self._engines.anew()
        return copied

    __deepcopy__ = __copy__

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DBConnect cannot be pickled: make one in each process")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def host(self) -> str | None:
        """The host that new sessions talk to; None if none was given yet."""
        return self._engines.host.read()

    @host.setter
    def host(self, host: str) -> None:
        self._engines.host.set(check_host(host))

    @property
    def engine(self) -> AsyncEngine | None:
        """The engine in use; None until the first session, and after `close`."""
        return self._engines.here()

    async def connect(self, host: str) -> None:
        """Replace the engine in use by a new one for `host`.

        Sessions in flight finish on the old engine; its connections are closed as they come back.
        If a creator fails, the old engine stays in use.
        """
        await self._engines.switch(host, anew=True)

    async def change_host(self, host: str) -> None:
        """Switch to `host` as `connect` does; do nothing if it is the host already.

        Concurrent calls make one engine.
        """
        await self._engines.switch(host, anew=False)

    async def create_engine(self, host: str | None = None) -> AsyncEngine:
        """Make an engine without `transaction_settings`, for migrations; the caller disposes of it.

        A `RuntimeError` while a test's transaction is open (`shared_transaction`).
        On SQLite, one that `from_url` makes does not enforce foreign keys (`ON DELETE CASCADE`),
        or altering a table would delete what refers to it: COMMIT checks them (`IntegrityError`).

        Args:
            host: The host to talk to. Default None: the host of new sessions.
        """
        engine = await self._engines.make_engine_for_caller(host if host is not None else self.host)
        check_foreign_keys_at_commit(engine)
        return engine

    async def create_session(self) -> SessionT_co:
        """Make a session that belongs to the caller, not to a context."""
        return (await self.session_maker())()

    async def session_maker(self) -> async_sessionmaker[SessionT_co]:
        """Run the handler, then return the sessionmaker, made on the first call."""
        handler = self._before_create_session_handler
        return await self._engines.session_maker_after(handler and partial(handler, self))

    def lazy_session_maker(self) -> async_sessionmaker[SessionT_co]:
        """Return an `async_sessionmaker` for what wants one at import time, such as an admin panel.

        It uses the engine that this connect has when it is called, in an event loop. Its sessions
        are in no context: who makes one commits and closes it. `configure()` changes only this one.
        It raises `RuntimeError` if it would have to wait: outside of an event loop; or if there is
        no engine yet, and a creator is an async function, or the handler has to set the host: then
        `await connect.session_maker()` first. The handler runs before a session's first statement.
        """
        handler = self._before_create_session_handler
        return LazySessionMaker(self._engines, self.session_maker if handler else None)

    async def ping(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109
        """Send the database SELECT 1, on a session of its own.

        Args:
            timeout: The seconds to wait for a free connection and the answer. Default 5.

        Raises:
            TimeoutError: If there is no answer in time.
            Exception: What SQLAlchemy or the driver raises if the database cannot be reached.
        """
        await result_within(timeout, self._execute(select(1)))

    async def wait_until_ready(
        self, statement: Select[Any] | None = None, attempts: int = 5, delay: float = 2.0
    ) -> None:
        """Wait until the database answers, for a process that may start before it.

        Each failure is logged, without the password.

        Args:
            statement: Run with `.limit(1)`, to see if its tables exist. Default None: SELECT 1.
            attempts: How often to try at most. Default 5.
            delay: The seconds between two attempts. Default 2.

        Raises:
            ValueError: If `attempts` is less than 1, or `delay` less than 0.
            Exception: What the last attempt raised.
        """
        if attempts < 1 or delay < 0:
            raise ValueError("attempts must be at least 1, and delay at least 0 seconds")
        statement = select(1) if statement is None else statement.limit(1)
        await until_ready(self, partial(self._execute, statement), attempts, delay)

    def pool_status(self) -> PoolStatus:
        """Count the connections of the engine in use; all are 0 if there is none."""
        return pool_status(self.engine) if self.engine is not None else PoolStatus()

    async def close(self) -> None:
        """Close the engines, if there are any. The next session makes a new one.

        Sessions in flight finish; their connections are closed as they come back.
        """
        await self._engines.close()

    async def _execute(self, statement: Executable) -> None:
        session = await self.create_session()
        real = real_session(session)
        try:
            if not real.in_transaction():
                await real.begin()  # with autobegin=False nothing else does
            await session.scalar(statement)  # SQLModel's session deprecates `execute`
        finally:
            await close_sessions([real])

    # Not public, but users' code reads and sets them.
    @property
    def _engine(self) -> AsyncEngine | None:
        return self._engines.put_by_hand or self._engines.here()

    @_engine.setter
    def _engine(self, engine: AsyncEngine) -> None:
        self._engines.put(engine)

    @property
    def _session_maker(self) -> SessionMaker | None:
        return self._engines.session_maker

    @_session_maker.setter
    def _session_maker(self, session_maker: SessionMaker | None) -> None:
        self._engines.session_maker = session_maker
