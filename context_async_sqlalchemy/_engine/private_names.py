"""What is private to SQLAlchemy, to drivers and to frameworks, and is used all the same.

Each is a debt: nothing public says it on all versions that are supported. Seen on SQLAlchemy 2.0.40
to 2.1.9, asyncpg 0.30 to 0.32, aiosqlite 0.20 to 0.22, FastAPI 0.115.12 to 0.165. A test in
`tests/engine/test_private_names.py` fails when one goes; `docs/reliability.md` tells users of them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import cached_property
from types import FunctionType
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, PoolProxiedConnection
from sqlalchemy.engine.interfaces import DBAPIConnection, ExecutionContext
from sqlalchemy.ext.asyncio import AsyncResult, AsyncSession
from sqlalchemy.orm import InstanceState, Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, Pool, QueuePool, StaticPool

# How SQLAlchemy's own extensions wait inside a greenlet; no page of its documentation has them.
from sqlalchemy.util import await_only as await_only, greenlet_spawn as greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet as in_greenlet
from sqlalchemy.util.queue import AsyncAdaptedQueue

# What is read

EXECUTE = "_execute_internal"  # of a Session: each statement, those of a lazy load and a subclass


def connections_of(transaction: SessionTransaction) -> list[Connection]:
    """Return the open connections of a transaction; SQLAlchemy 2.1.7 has a public name for them."""
    connections = {entry[0] for entry in transaction._connections.values()}
    return [c for c in connections if not (c.closed or c.invalidated)]


def has_connections(transaction: SessionTransaction) -> bool:
    """Return whether a transaction has taken a connection, be it closed by now."""
    return bool(transaction._connections)


def is_committed(transaction: SessionTransaction) -> bool:
    """Return whether COMMIT was sent and the transaction has not ended, so that none may listen."""
    return transaction._state is SessionTransactionState.COMMITTED


def takes_one_engine(session: Session) -> bool:
    """Return whether a session, unless told otherwise, takes the connections of its `bind` only."""
    return type(session).get_bind is Session.get_bind and not getattr(session, _BINDS)


_BINDS = "binds" if hasattr(Session(), "binds") else "_Session__binds"  # public since 2.1


def is_changing(transaction: SessionTransaction) -> bool:
    """Return whether a task is taking a connection, or ending the transaction."""
    # SQLAlchemy refuses a second task then, and has no way to ask before.
    return transaction._current_fn is not None


def is_connecting(transaction: SessionTransaction) -> bool:
    """Return whether a task is taking a connection."""
    return getattr(transaction._current_fn, "__name__", None) == "_connection_for_bind"


def is_executing(connection: Connection) -> bool:
    """Return whether a task is inside a statement of a connection."""
    adapter = connection.connection.dbapi_connection
    if (lock := lock_of(adapter)) is not None and lock.locked():
        return True
    # psycopg queues statements itself, and is public about what it does.
    status = getattr(getattr(adapter, "info", None), "transaction_status", None)
    return getattr(status, "name", None) == "ACTIVE"


def lock_of(connection: object) -> asyncio.Lock | None:
    """Return the lock that SQLAlchemy's adapter of a driver holds during a statement, if any."""
    return getattr(connection, "_execute_mutex", None)


def has_failed_to_begin(driver_connection: object) -> bool:
    """Return whether asyncpg holds on to a transaction whose BEGIN has failed."""
    # As SERIALIZABLE does on a hot standby: each later one would be a SAVEPOINT, and fail.
    return getattr(driver_connection, "_top_xact", None) is not None


def take_cancellations(driver_connection: object) -> set[asyncio.Task[None]]:
    """Let asyncpg go on asking the server to cancel a statement; return the tasks that do so."""
    # It gives up when its connection is closed.
    cancellations: set[asyncio.Task[None]] = getattr(driver_connection, "_cancellations", set())
    taken = set(cancellations)
    cancellations.clear()
    return taken


def protocol_and_transport(driver: object) -> tuple[Any, Any]:
    """Return what a connection of asyncpg speaks with, and through; else None, and None."""
    # What asyncpg sends is closed to others. `begin_in_flight` sends BEGIN before it.
    return getattr(driver, "_protocol", None), getattr(driver, "_transport", None)


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


def modified_states(session: Session) -> set[InstanceState[Any]]:
    """Return the set of the objects of a session that were changed, itself."""
    return session.identity_map._modified


def starlette_handlers(scope: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Return the exception handlers of the application of a request, by class and by status."""
    return scope.get("starlette.exception_handlers", ({}, {}))  # type: ignore[no-any-return]


# What is set or replaced


def replace_of_dialect(dialect: Dialect, name: str, function: Callable[[Any], None]) -> None:
    """Let every engine with this dialect do this, such as `do_commit`, by this function."""
    # The event "commit" slows every statement down, and comes too early; "close" changes nothing.
    setattr(dialect, name, function)


class CommitWasRollbackError(Exception):
    """The server has answered a COMMIT with ROLLBACK, or would."""


def let_commit_tell(driver_connection: Any) -> None:
    """Let a connection of asyncpg raise `CommitWasRollbackError`."""
    # It ignores the tag of the answer. A `connection_class` would miss the engines of others.
    cls = type(driver_connection)
    if not issubclass(cls, _TellsOfCommit) and hasattr(cls, "get_server_pid"):
        if cls not in _telling:
            names = {"__slots__": (), "__module__": cls.__module__}
            _telling[cls] = type(cls.__name__, (_TellsOfCommit, cls), names)
        replace_class(driver_connection, _telling[cls])


class _TellsOfCommit:
    __slots__ = ()

    def execute(self, query: str, *args: Any, **options: Any) -> Awaitable[str]:
        executing = super().execute(query, *args, **options)  # type: ignore[misc]
        return self._tell(executing) if query == "COMMIT;" else executing

    async def _tell(self, committing: Awaitable[str]) -> str:
        if (tag := await committing) == "ROLLBACK":
            raise CommitWasRollbackError
        return tag


_telling: dict[type, type] = {}


class CallsBeforeWrite:
    """Makes a protocol of asyncpg call `before_write` once what it will send cannot be refused."""

    # Encoding it and writing it are compiled, and so is all between them but for this method.
    before_write: Callable[[], None]

    @property
    def _on_waiter_completed(self) -> Any:
        self.before_write()
        return super()._on_waiter_completed  # type: ignore[misc]


def replace_class(session: object, cls: type[Any]) -> None:
    """Let an object, such as a session, be one of `cls`, a subclass of its class."""
    session.__class__ = cls


def wrap_cursor(result: AsyncResult[Any], wrap: Callable[[Any, Connection], Any]) -> None:
    """Let a result that is streamed fetch from its cursor through `wrap`."""
    streamed: Any = getattr(result._real_result, "raw", result._real_result)
    streamed.cursor = wrap(streamed.cursor, streamed.connection)


def replace_get_bind(session: Session, get_bind: Callable[..., Any]) -> None:
    """Let every later statement of a session call this `get_bind` first, which may raise."""
    session.get_bind = get_bind  # type: ignore[method-assign]


class CheckedConnection(Connection):
    """Checks its statements; for a listener, SQLAlchemy joins those of every event, each time."""

    # An error if one is not there: nothing would be checked.
    send_one, send_many = Connection._exec_single_context, Connection._exec_insertmany_context

    def check(self, context: ExecutionContext) -> None:
        """Raise if the statement is not to be sent."""

    def _exec_single_context(self, dialect: Dialect, context: Any, *rest: Any) -> Any:
        self.check(context)
        return self.send_one(dialect, context, *rest)

    def _exec_insertmany_context(self, dialect: Dialect, context: ExecutionContext) -> Any:
        self.check(context)
        return self.send_many(dialect, context)


def replace_pool(engine: Engine, pool: Pool) -> None:
    """Let an engine take its connections from another pool."""
    engine.pool = pool


def pool_with_queues(
    fifo: Callable[[int], asyncio.Queue[Any]], lifo: Callable[[int], asyncio.Queue[Any]]
) -> type[AsyncAdaptedQueuePool]:
    """Return a pool class that keeps its idle connections in a queue that one of these makes."""
    # No option of a pool decides who is next among those that wait for a connection.

    class Queue(AsyncAdaptedQueue[Any]):
        @cached_property  # SQLAlchemy makes it when it is first used, on the loop
        def _queue(self) -> asyncio.Queue[Any]:
            return (lifo if self.use_lifo else fifo)(self.maxsize)

    namespace = {"__module__": AsyncAdaptedQueuePool.__module__, "_queue_class": Queue}
    base = AsyncAdaptedQueuePool
    return type(base.__name__, (base,), namespace)  # SQLAlchemy names the logger after it


class WatchedStaticPool(StaticPool):
    """Calls its own methods before a checkout, for which the public event is late, and after."""

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


def call_in_thread(connection: Any, function: Callable[[Any], None]) -> None:
    """Let the thread of a connection of aiosqlite call a function with that of sqlite3."""
    # It has no public way to; for one that sets an authorizer, since 0.22.
    calling = connection._execute(function, connection._conn)
    calling.send(None)
    calling.close()


class Provider:
    """A greenlet of this class waits as SQLAlchemy's own: its parent is given what to wait for."""

    # SQLAlchemy makes a new one for each call, and has no way to use it again.
    __sqlalchemy_greenlet_provider__ = True


def methods_that_spawn(spawn: Callable[..., Awaitable[Any]]) -> dict[str, Any]:
    """Return the methods of `AsyncSession` that run in a greenlet, with `spawn` to make it."""
    # They call a function of their module, `greenlet_spawn`, which others call, too.
    methods: dict[str, Any] = {}
    for name, method in vars(AsyncSession).items():
        code = getattr(method, "__code__", None)
        if code is not None and "greenlet_spawn" in code.co_names and not method.__closure__:
            namespace = {**method.__globals__, "greenlet_spawn": spawn}
            methods[name] = FunctionType(code, namespace, name, method.__defaults__)
            methods[name].__kwdefaults__ = method.__kwdefaults__
    return methods


def take_out(entry: ConnectionPoolEntry) -> DBAPIConnection | None:
    """Take the connection out of its place in the pool, where the next user opens another one."""
    # Closing it waits, and meanwhile nobody may be given it.
    connection, entry.dbapi_connection = entry.dbapi_connection, None  # type: ignore[misc]
    return connection


def take_pooled(connection: Connection) -> PoolProxiedConnection:
    """Take from a connection what it has of the pool, as if that were invalidated already."""
    # SQLAlchemy does so only when the connection of the driver has been closed.
    pooled, connection._dbapi_connection = connection.connection, None
    return pooled
