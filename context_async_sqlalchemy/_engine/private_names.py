"""What is private to SQLAlchemy, to drivers and to frameworks, and is used all the same.

Each is a debt: nothing public says it on all versions that are supported. Seen on SQLAlchemy 2.0.40
to 2.1.9, asyncpg 0.30 to 0.32, aiosqlite 0.20 to 0.22, FastAPI 0.115.12 to 0.165. A test in
`tests/engine/test_private_names.py` fails when one goes; `docs/reliability.md` tells users of them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import new_class
from typing import Any, NoReturn

from sqlalchemy import Connection, Dialect, Engine, Pool, QueuePool, StaticPool
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.pool import ConnectionPoolEntry

# How SQLAlchemy's own extensions wait inside a greenlet; no page of its documentation has them.
from sqlalchemy.util import await_only as await_only, greenlet_spawn as greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet as in_greenlet

# What is read


def connections_of(transaction: SessionTransaction) -> list[Connection]:
    """Return the open connections of a transaction; SQLAlchemy 2.1.7 has a public name for them."""
    connections = {connection for connection, *_ in transaction._connections.values()}
    return [c for c in connections if not (c.closed or c.invalidated)]


def has_connections(transaction: SessionTransaction) -> bool:
    """Return whether a transaction has taken a connection, be it closed by now."""
    return bool(transaction._connections)


def is_committed(transaction: SessionTransaction) -> bool:
    """Return whether COMMIT was sent and the transaction has not ended, so that none may listen."""
    return transaction._state is SessionTransactionState.COMMITTED


def takes_one_engine(session: Session) -> bool:
    """Return whether a session, unless told otherwise, takes the connections of its `bind` only."""
    # SQLAlchemy 2.1 has a public name for them.
    binds = getattr(session, "binds", None) or getattr(session, "_Session__binds", None)
    return type(session).get_bind is Session.get_bind and not binds


def is_changing(transaction: SessionTransaction) -> bool:
    """Return whether a task is taking a connection, or ending the transaction."""
    # SQLAlchemy refuses a second task then, and has no way to ask before.
    return transaction._current_fn is not None


def is_connecting(transaction: SessionTransaction) -> bool:
    """Return whether a task is taking a connection."""
    current = transaction._current_fn
    return current is not None and current.__name__ == "_connection_for_bind"


def is_executing(connection: Connection) -> bool:
    """Return whether a task is inside a statement of a connection."""
    adapter = connection.connection.dbapi_connection
    lock = lock_of(adapter)
    if lock is not None and lock.locked():
        return True
    # psycopg queues statements itself, and is public about what it does.
    status = getattr(getattr(adapter, "info", None), "transaction_status", None)
    return getattr(status, "name", None) == "ACTIVE"


def lock_of(connection: object) -> asyncio.Lock | None:
    """Return the lock that SQLAlchemy's adapter of a driver holds during a statement."""
    # Drivers that queue statements themselves have none.
    return getattr(connection, "_execute_mutex", None)


def has_failed_to_begin(driver_connection: object) -> bool:
    """Return whether asyncpg holds on to a transaction whose BEGIN has failed."""
    # As SERIALIZABLE does on a hot standby: each later one would be a SAVEPOINT, and fail.
    return getattr(driver_connection, "_top_xact", None) is not None


def pool_of(entry: ConnectionPoolEntry) -> Pool:
    """Return the pool to which a connection comes back."""
    return entry._ConnectionRecord__pool  # type: ignore[attr-defined,no-any-return]


def max_overflow(pool: QueuePool) -> int:
    """Return how many connections a pool opens beyond its size; below 0, there is no limit."""
    return pool._max_overflow


def closing_calls_listeners(session: Session) -> bool:
    """Return whether a listener, which may send a statement, is called when a session is closed."""
    return bool(session.dispatch.persistent_to_detached)


def ping(dialect: Dialect, connection: DBAPIConnection) -> bool:
    """Ping as the pool does, with its events; return whether there was an answer."""
    return dialect._do_ping_w_event(connection)


def starlette_handlers(scope: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return the exception handlers of the application of a request, by class and by status."""
    return scope.get("starlette.exception_handlers", ({}, {}))  # type: ignore[no-any-return]


# What is set or replaced


def replace_commit(dialect: Dialect, do_commit: Callable[[Any], None]) -> None:
    """Let every engine with this dialect commit by this function."""
    # The event "commit" makes every statement of an engine slower, and comes too early.
    dialect.do_commit = do_commit  # type: ignore[assignment]


def replace_close(dialect: Dialect, do_close: Callable[[DBAPIConnection], None]) -> None:
    """Let every engine with this dialect close its connections by this function."""
    # The event "close" can change nothing.
    dialect.do_close = do_close  # type: ignore[assignment]


class CommitWasRollbackError(Exception):
    """The server has answered a COMMIT with ROLLBACK, or would."""


def let_commit_tell(driver_connection: Any) -> None:
    """Let a connection of asyncpg raise `CommitWasRollbackError`."""
    # Its transaction ignores the tag of the answer, and its connection has no way to be asked. A
    # `connection_class` would miss the engines that others make.
    cls = type(driver_connection)
    if cls not in _telling.values() and hasattr(cls, "get_server_pid"):
        if cls not in _telling:
            namespace = {"__slots__": (), "__module__": cls.__module__}
            _telling[cls] = new_class(
                cls.__name__, (_TellsOfCommit, cls), exec_body=lambda ns: ns.update(namespace)
            )
        replace_class(driver_connection, _telling[cls])


class _TellsOfCommit:
    __slots__ = ()

    def execute(self, query: str, *args: Any, **options: Any) -> Awaitable[str]:
        executing = super().execute(query, *args, **options)  # type: ignore[misc]
        return self._tell(executing) if query == "COMMIT;" else executing

    async def _tell(self, committing: Awaitable[str]) -> str:
        tag = await committing
        if tag == "ROLLBACK":
            raise CommitWasRollbackError
        return tag


_telling: dict[type, type] = {}


def replace_class(session: AsyncSession, cls: type[AsyncSession]) -> None:
    """Let a session be one of `cls`, a subclass of its class with other methods."""
    # Nothing that is set on the object itself changes what `async with` calls.
    session.__class__ = cls


def replace_get_bind(session: Session, get_bind: Callable[..., NoReturn]) -> None:
    """Let every later statement of a session fail: each calls `get_bind` first."""
    session.get_bind = get_bind  # type: ignore[method-assign]


def replace_pool(engine: Engine, pool: Pool) -> None:
    """Let an engine take its connections from another pool."""
    engine.pool = pool


class WatchedStaticPool(StaticPool):
    """A StaticPool that calls its own methods before a checkout and after a checkin."""

    # The public events come too late: the one before has lost track of its connection by then.

    def before_checkout(self) -> None:
        """Wait, or raise."""

    def after_checkin(self) -> None:
        """Let the next one go on."""

    def _do_get(self) -> ConnectionPoolEntry:
        self.before_checkout()
        try:
            return super()._do_get()
        except BaseException:
            self.after_checkin()
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        self.after_checkin()


def set_authorizer(adapter: Any, authorizer: Callable[..., int] | None) -> None:
    """Let a function decide what a connection of aiosqlite may do."""
    # aiosqlite has a public method since 0.22; the call belongs to its thread.
    adapter.run_async(lambda raw: raw._execute(raw._conn.set_authorizer, authorizer))


def take_out(entry: ConnectionPoolEntry) -> DBAPIConnection | None:
    """Take the connection out of its place in the pool, where the next user opens another one."""
    # Closing it waits, and meanwhile nobody may be given it.
    connection = entry.dbapi_connection
    entry.dbapi_connection = None  # type: ignore[misc]  # declared read-only
    return connection


def wrap_routers(
    router_class: type[Any], wrap: Callable[[Callable[..., Awaitable[None]]], Callable[..., Any]]
) -> None:
    """Wrap, once, the method by which every router of FastAPI is called."""
    # Nothing else lets a dependency know of the response that its request is answered with.
    call = router_class.__call__
    if getattr(call, "wrapped_by", None) != __name__:
        wrapped = wrap(call)
        wrapped.wrapped_by = __name__  # type: ignore[attr-defined]
        router_class.__call__ = wrapped
