"""Leak detection: a warning when a context's session holds a connection for a long time."""

import asyncio
import inspect
import time
from contextvars import Context, copy_context

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from context_async_sqlalchemy._engine.log import logger

# Frames of these packages may lie between the user's code and this file.
_BETWEEN = {__name__.partition(".")[0], "anyio", "asyncio", "contextlib"}


def detect_leaks(
    session: AsyncSession,
    threshold: float,
    connect: object,
    request: tuple[str, str] | None,
    endpoint: object = None,
) -> None:
    """Warn from now on when `session` holds a connection for more than `threshold` seconds.

    The warning names the connect, the method and the path of the request, and the endpoint that the
    session was made for, or else the line that asks for it now.
    """
    # The client chooses the path, and may put line breaks into it: a repr has none.
    holder = f"by the request {request[0]} {request[1]!r}" if request else "outside of a request"
    origin = _caller() if endpoint is None else f"for the endpoint {_name(endpoint)}"
    detector = _Detector(threshold, connect, f"{holder}; its session was made {origin}")
    event.listen(session.sync_session, "after_begin", detector.on_begin)
    event.listen(session.sync_session, "after_transaction_end", detector.on_end)


class _Detector:
    """Watches one session, from the first statement of each transaction to its end."""

    def __init__(self, threshold: float, connect: object, circumstances: str) -> None:
        self.threshold = threshold
        self.connect = connect
        self.circumstances = circumstances
        self.transaction: SessionTransaction | None = None  # the outermost one
        self.since = 0.0
        self.timer: asyncio.TimerHandle | None = None  # None: it has been called, or stopped

    def on_begin(self, _: Session, transaction: SessionTransaction, __: Connection) -> None:
        # Also called for a savepoint, and for another database of the same session.
        if transaction.parent is not None or transaction is self.transaction:
            return
        self._stop_timer()  # of a transaction that failed to end
        self.transaction = transaction
        self.since = time.monotonic()
        # The warning needs the context variables of the request, such as the trace ID of a log
        # record. The timer has an empty context: the loop keeps a cancelled timer until it is due.
        self.timer = asyncio.get_running_loop().call_later(
            self.threshold, copy_context().run, self._on_timer, context=Context()
        )

    def on_end(self, _: Session, transaction: SessionTransaction) -> None:
        if transaction is not self.transaction:
            return
        self.transaction = None
        # If the event loop was blocked, it could not call the timer in time.
        if self._stop_timer() and time.monotonic() - self.since > self.threshold:
            self._warn()

    def _on_timer(self) -> None:
        self.timer = None
        # SQLAlchemy does not report the end of a transaction whose connection fails to close, and
        # reports it late when another listener takes long after the commit.
        transaction = self.transaction
        if transaction is not None and transaction.session.get_transaction() is transaction:
            self._warn()

    def _stop_timer(self) -> bool:
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _warn(self) -> None:
        logger.warning(
            "%r: a connection has been held for %.2f seconds, %s. Before slow work that is not the "
            "database's, 'await session.commit()' gives the connection back.",
            self.connect,
            time.monotonic() - self.since,
            self.circumstances,
        )


def _caller() -> str:
    """Return the file and line that ask for the session."""
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "asyncio.events":
            break  # db_session runs as its own task, as in a gather()
        if module.partition(".")[0] not in _BETWEEN:
            return f"at {frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "in a task of its own"


def _name(endpoint: object) -> str:
    named = endpoint if hasattr(endpoint, "__qualname__") else type(endpoint)
    return f"{named.__module__}.{named.__qualname__}"
