"""The cursor of a stream, from which tasks fetch in turn: not every driver lets them queue."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from context_async_sqlalchemy._engine.turns import Scope, enter, here, leave, open_here


class QueuedCursor:
    """A cursor of `session` on `connection`."""

    def __init__(self, session: Session, cursor: Any, connection: Connection) -> None:
        self._session = session
        self._cursor = cursor
        self._connection = connection
        self._transaction = session.get_transaction()
        self._is_cut_off = False
        if connection.dialect.name in {"mysql", "mariadb"}:
            event.listen(connection, "before_cursor_execute", self._cut_off)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._cursor, name)
        if name in ("fetchone", "fetchmany", "fetchall"):
            return partial(self._in_turn, self._fetch, attribute)
        return attribute

    def close(self) -> None:
        """Close the cursor."""
        self._in_turn(self._cursor.close)

    def _in_turn(self, call: Callable[..., Any], *args: Any) -> Any:
        scope = Scope(open_here())
        try:
            # SQLAlchemy discards the connection of a fetch that is cancelled, and would do so while
            # another task is inside of a statement of it.
            enter(self._session, scope, is_shielded=True)
            here.set(scope)
            return call(*args)
        except BaseException as error:
            if not isinstance(error, Exception) and not self._connection.closed:
                self._connection.invalidate(error)
            raise
        finally:
            leave(self._session, scope)

    def _fetch(self, fetch: Callable[..., Any], *size: int) -> Any:
        if self._session.get_transaction() is not self._transaction:
            raise InvalidRequestError(_NO_TRANSACTION)
        if self._is_cut_off:
            raise InvalidRequestError(_CUT_OFF)
        return fetch(*size)

    def _cut_off(self, *_: object) -> None:
        # The drivers of MySQL throw the rest of the rows away, and warn.
        self._is_cut_off = True


_CUT_OFF = (
    "Another statement was executed on the connection of this stream, which no driver of MySQL "
    "allows: read a stream to its end first, or give it a session of its own with "
    "'async with new_non_ctx_session(connect):'."
)
_NO_TRANSACTION = (
    "The transaction of this stream has ended, by a commit, a rollback or a close of its session, "
    "perhaps in another task: read a stream to its end first, or give it a session of its own with "
    "'async with new_non_ctx_session(connect):'."
)
