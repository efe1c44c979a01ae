"""Which errors are transient, and doing the same work again."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from context_async_sqlalchemy.auto_commit import BeforeCommitCallback, is_outcome_unknown
from context_async_sqlalchemy.context import DBSessionContext, current_context
from context_async_sqlalchemy.exceptions import CommitOutcomeUnknownError
from context_async_sqlalchemy.run_in_new_context import new_db_session_ctx

if TYPE_CHECKING:
    from stamina import Attempt

P = ParamSpec("P")
T = TypeVar("T")


class TransientKind(Enum):
    """Why the same work may succeed if it is done again."""

    CONFLICT = "it lost against other work: a serialization failure, a deadlock, a lock"
    UNAVAILABLE = "the database could not be reached, or takes no connections now"


# https://www.postgresql.org/docs/current/errcodes-appendix.html
_SQLSTATES = {
    "40001": TransientKind.CONFLICT,  # serialization_failure; CockroachDB and YugabyteDB use it too
    "40P01": TransientKind.CONFLICT,  # deadlock_detected
    "53300": TransientKind.UNAVAILABLE,  # too_many_connections
    "55P03": TransientKind.CONFLICT,  # lock_not_available
    "57P01": TransientKind.UNAVAILABLE,  # admin_shutdown
    "57P02": TransientKind.UNAVAILABLE,  # crash_shutdown
    "57P03": TransientKind.UNAVAILABLE,  # cannot_connect_now: starting up, or shutting down
    "08000": TransientKind.UNAVAILABLE,  # connection_exception
    "08001": TransientKind.UNAVAILABLE,  # sqlclient_unable_to_establish_sqlconnection
    "08003": TransientKind.UNAVAILABLE,  # connection_does_not_exist
    "08004": TransientKind.UNAVAILABLE,  # sqlserver_rejected_establishment_of_sqlconnection
    "08006": TransientKind.UNAVAILABLE,  # connection_failure
}
# https://dev.mysql.com/doc/mysql-errors/8.4/en/
_MYSQL_NUMBERS = {
    1040: TransientKind.UNAVAILABLE,  # too many connections
    1205: TransientKind.CONFLICT,  # lock wait timeout
    1213: TransientKind.CONFLICT,  # deadlock
    2002: TransientKind.UNAVAILABLE,  # a server that cannot be reached
    2003: TransientKind.UNAVAILABLE,
}
_SQLITE_BUSY = 5  # https://www.sqlite.org/rescode.html; the low byte of its extended codes


def is_transient_error(exc: BaseException) -> bool:
    """Return whether the same work may succeed if it is done again.

    True for a serialization failure, a deadlock, a lock that was not available, a connection that
    was lost or refused, a server that starts up, shuts down or has too many connections, a busy
    SQLite database, and for MySQL's errors of these kinds. Decided by the SQLSTATE, the error
    number and what SQLAlchemy knows, of `exc`, its `__cause__`, and the members of an exception
    group. (psycopg has no SQLSTATE for a connection that was refused, whatever the reason.)

    Always False if a constraint was violated, or if the outcome of a COMMIT is unknown.

    Args:
        exc: What was raised.
    """
    return transient_kind(exc) is not None


def transient_kind(exc: BaseException) -> TransientKind | None:
    """Return why `is_transient_error` says that the same work may succeed; None if it does not.

    Args:
        exc: What was raised.
    """
    kinds = [kind for kind in map(_kind_of, _related(exc)) if kind is not None]
    return kinds[0] if kinds and not _forbids_repetition(exc) else None


def is_connect_timeout(exc: BaseException) -> bool:
    """Return whether there was no connection in time, from the server or from the pool.

    This is not transient: who has waited that long should not wait again. (The `TimeoutError` of a
    statement does not count: the server may still be busy with it.)

    Args:
        exc: What was raised.
    """
    if isinstance(exc, PoolTimeoutError):
        return True
    return isinstance(exc, TimeoutError) and _comes_through(exc, "sqlalchemy.pool.")


def retry_on_transient_error(
    attempts: int = 3,
    *,
    timeout: float | None = None,
    wait_initial: float = 0.05,
    wait_max: float = 5.0,
    wait_jitter: float = 0.1,
    before_commit: BeforeCommitCallback | None = None,
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Run an async function in a new context, and again in another one after a transient error.

        @retry_on_transient_error(attempts=5)
        async def transfer(source: int, target: int, amount: int) -> None:
            session = await db_session(connect)
            ...

    Each attempt is a unit of work, like a block of `new_db_session_ctx`: committed if the function
    returns, rolled back if it raises. The last error is raised unchanged. An attempt that has
    committed a part of its work is not repeated. Side effects outside of the database happen in
    each attempt: leave them to `on_commit`.

    `stamina` does the waiting and the repeating; its documentation has the instrumentation,
    `stamina.set_testing` and `stamina.set_active`. Install the extra "retry".

    Args:
        attempts: How often to call the function at most. Default 3.
        timeout: The seconds after which not to try again. Default None: no limit.
        wait_initial: The seconds to wait before the second attempt, doubled for each that follows.
            Default 0.05.
        wait_max: The most seconds to wait between two attempts. Default 5.
        wait_jitter: The most seconds to add to a wait, at random. Default 0.1.
        before_commit: Called with each session that is about to be committed. Default None.

    Raises:
        ImportError: If stamina is not installed.
        TypeError: If the decorated object is not an async function.
        ValueError: If `attempts` is less than 1.
    """
    retrying = Retrying(attempts, timeout, wait_initial, wait_max, wait_jitter)

    def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(
                f"retry_on_transient_error decorates an async function, not {function!r}"
            )

        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            context: DBSessionContext

            def is_repeatable(error: BaseException) -> bool:
                return may_be_repeated(error, context)

            async for attempt in retrying(is_repeatable, name):
                with attempt:
                    async with new_db_session_ctx(before_commit):
                        context = current_context()
                        context.watch_commits()
                        return await function(*args, **kwargs)
            raise AssertionError("stamina raises the last error")

        name = f"{call.__module__}.{call.__qualname__}"
        return call

    return decorate


class Retrying:
    """How often to try, and how long to wait in between, with stamina."""

    def __init__(
        self,
        attempts: int,
        timeout: float | None = None,
        wait_initial: float = 0.05,
        wait_max: float = 5.0,
        wait_jitter: float = 0.1,
    ) -> None:
        if callable(attempts):
            raise TypeError("write @retry_on_transient_error(), with parentheses")
        if not isinstance(attempts, int):
            raise TypeError(f"attempts must be an int, not {type(attempts).__name__}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {attempts}")
        try:
            import stamina
        except ImportError as error:
            raise ImportError(
                "Trying again needs stamina: 'pip install stamina', or install "
                'context-async-sqlalchemy with its extra "retry"'
            ) from error
        self.attempts = attempts
        self._retry_context = functools.partial(
            stamina.retry_context,
            attempts=attempts,
            timeout=timeout,
            wait_initial=wait_initial,
            wait_max=wait_max,
            wait_jitter=wait_jitter,
        )

    def __call__(self, on: Callable[[Exception], bool], name: str) -> AsyncIterator[Attempt]:
        """Return the attempts; the first that does not fail with such an error is the last.

        Args:
            on: Returns whether to try again after an error.
            name: What stamina's instrumentation calls the work.
        """
        # Without the arguments: stamina would log them, and they may be secret.
        return self._retry_context(on).with_name(name, (), {})


def may_be_repeated(error: BaseException, context: DBSessionContext) -> bool:
    """Return whether the work of `context`, which has failed with `error`, may be done again."""
    if not is_transient_error(error):
        return False
    if context.watch_commits().durable:
        error.add_note("Not tried again: a part of its work had been committed, or may have been.")
        return False
    return True


def _forbids_repetition(exc: BaseException) -> bool:
    # With what was being handled, too: code that fails while it looks whether the work was done
    # still does not know.
    return any(
        isinstance(error, CommitOutcomeUnknownError)
        or (isinstance(error, DBAPIError) and is_outcome_unknown(error))
        for error in _related(exc, with_context=True)
    ) or any(isinstance(error, IntegrityError) for error in _related(exc))


def _related(exc: BaseException, with_context: bool = False) -> Iterator[BaseException]:
    """Yield `exc`, the members of a group, their causes, and with `with_context` their contexts."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [exc]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            waiting += error.exceptions
        if with_context:
            waiting.append(error.__context__)
        if not isinstance(error, DBAPIError):  # which knows more than the error of its driver
            waiting.append(error.__cause__)


def _kind_of(error: BaseException) -> TransientKind | None:
    if not isinstance(error, DBAPIError):
        # SQLAlchemy does not wrap all that a driver raises while it connects.
        kind = _kind_of_code(error)
        is_lost = _is_refused_connection(error) or _is_asyncpg_without_connection(error)
    elif is_outcome_unknown(error):
        return None
    else:
        kind = _kind_of_code(error.orig) or _kind_of_mysql_number(error.orig)
        is_lost = error.connection_invalidated or _is_psycopg_without_connection(error)
    return TransientKind.UNAVAILABLE if kind is None and is_lost else kind


def _is_refused_connection(error: BaseException) -> bool:
    # asyncio raises a plain OSError for a name with several addresses, and for "no route to host".
    if not (isinstance(error, ConnectionError) or type(error) is OSError):
        return False
    # Another service that hangs up has an error of the same type, and is none of our business.
    return error.__traceback__ is None or _comes_through(error, "sqlalchemy.")


def _comes_through(error: BaseException, package: str) -> bool:
    modules = (f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(error.__traceback__))
    return any(module.startswith(package) for module in modules)


def _kind_of_code(error: BaseException | None) -> TransientKind | None:
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    if isinstance(sqlite_code, int) and sqlite_code & 0xFF == _SQLITE_BUSY:
        return TransientKind.CONFLICT
    sqlstate = getattr(error, "sqlstate", None)
    return _SQLSTATES.get(sqlstate) if isinstance(sqlstate, str) else None


def _kind_of_mysql_number(error: BaseException | None) -> TransientKind | None:
    number = next(iter(getattr(error, "args", ())), None)
    return _MYSQL_NUMBERS.get(number) if isinstance(number, int) else None


def _is_asyncpg_without_connection(error: BaseException) -> bool:
    # Lost while it is set up; or used after the server has ended it, before asyncpg has noticed.
    asyncpg = sys.modules.get("asyncpg")
    if asyncpg is None or isinstance(error, ValueError):  # a ValueError of asyncpg's: a bad option
        return False
    return isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError))


def _is_psycopg_without_connection(error: DBAPIError) -> bool:
    is_psycopg = getattr(error.orig, "sqlstate", "") is None  # when it gets no connection
    return is_psycopg and isinstance(error, OperationalError) and error.statement is None
