"""What goes through the engines of the process, for those who ask: statements and connections.

The listeners are on the classes of SQLAlchemy, so that they reach each engine, whoever makes it and
when; they are there when somebody has asked. Who asks now is told by a context variable, which a
child task inherits and another request does not.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from time import perf_counter
from typing import Any

from sqlalchemy import Connection, Engine, Pool, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection


class Kind(IntEnum):  # whose hash costs nothing
    """What somebody does with an engine."""

    STATEMENT = 0  # to execute it
    WAIT = 1  # for a connection
    USE = 2  # of a connection


class Step:
    """A statement, or a connection that is waited for or used: since when, and how long."""

    __slots__ = ("__weakref__", "engine", "kind", "observers", "seconds", "since", "text")

    def __init__(self, kind: Kind, engine: Engine, text: str = "") -> None:
        self.kind = kind
        self.engine = engine
        self.text = text
        self.seconds: float | None = None  # None: it has not ended
        self.observers = (*_observers.get(), *_everywhere)
        for observer in self.observers:
            observer.began(self)
        self.since = perf_counter()

    def so_far(self) -> float:
        """Return how long it took, or takes already, in seconds."""
        return perf_counter() - self.since if self.seconds is None else self.seconds

    def end(self) -> None:
        self.seconds = perf_counter() - self.since
        for observer in self.observers:
            observer.ended(self)


class Observer:
    """Is told of what its context does, and the tasks that this starts."""

    is_request = False

    def began(self, step: Step) -> None:
        """Note it."""

    def ended(self, step: Step) -> None:
        """Note it."""

    def rewritten(self, text: str, is_formatted: bool) -> str:
        """Return a statement as it is sent; in one that the driver formats, a % is doubled."""
        return text


@contextmanager
def observe(observer: Observer, *, new_request: bool = False) -> Generator[None]:
    """Tell `observer` of what this context does in a block; `listen` is called around it."""
    others = _observers.get()
    if new_request:
        # A server may start it from inside the one before.
        others = tuple(other for other in others if not other.is_request)
    token = _observers.set((*others, observer))
    try:
        yield
    finally:
        _observers.reset(token)


def observe_everywhere(observer: Observer) -> None:
    """Tell `observer` of what every context does, from now on."""
    global _everywhere
    listen()
    _everywhere = (*_everywhere, observer)


def listen() -> None:
    """Listen to every engine from now on.

    For good: another thread may be calling the listeners, and fails if one is removed meanwhile.
    """
    global _is_listening
    if _is_listening:
        return
    _is_listening = True
    event.listen(Engine, "before_cursor_execute", _before_statement, retval=True)
    event.listen(Engine, "after_cursor_execute", _after_statement)
    event.listen(Engine, "handle_error", _after_error)
    event.listen(Pool, "checkin", _after_use)
    event.listen(Pool, "invalidate", _after_use)
    # No event comes before a connection is waited for.
    setattr(Engine, "raw_connection", _wait)  # noqa: B010  # mypy takes it for another type


def _before_statement(
    connection: Connection, _: Any, text: str, parameters: Any, context: Any, __: bool
) -> tuple[str, Any]:
    if (_observers.get() or _everywhere) and not _OF_TRANSACTION.match(text):
        step = Step(Kind.STATEMENT, connection.engine, text)
        setattr(context, _STEP, step)
        is_formatted = "format" in connection.dialect.paramstyle and not context.no_parameters
        for observer in step.observers:
            text = observer.rewritten(text, is_formatted)
    return text, parameters


def _after_statement(
    _: Connection, __: Any, ___: str, ____: Any, context: Any, _____: bool
) -> None:
    _end(vars(context).pop(_STEP, None))


def _after_error(error: ExceptionContext) -> None:
    if error.execution_context is not None:
        _end(vars(error.execution_context).pop(_STEP, None))


def _wait(engine: Engine) -> PoolProxiedConnection:
    if not (_observers.get() or _everywhere):
        return _raw_connection(engine)
    wait = Step(Kind.WAIT, engine)
    try:
        connection = _raw_connection(engine)
    finally:
        wait.end()
    connection.info[_STEP] = Step(Kind.USE, engine)
    return connection


def _after_use(_: Any, entry: ConnectionPoolEntry, *__: Any) -> None:
    _end(entry.info.pop(_STEP, None))


def _end(step: Step | None) -> None:
    if step is not None:
        step.end()


_STEP = "_context_async_sqlalchemy_step"

# What begins and ends a transaction or a savepoint, in whose place a test may have another one. The
# last is what `transaction_settings` sends if it cannot ride with BEGIN.
_OF_TRANSACTION = re.compile(
    r"\s*(?:(?:BEGIN|START\s+TRANSACTION|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE"
    r"|PREPARE\s+TRANSACTION)\b|SELECT\s+pg_catalog\.set_config\()",
    re.IGNORECASE,
)

_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())
_everywhere: tuple[Observer, ...] = ()
_is_listening = False
_raw_connection = Engine.raw_connection
