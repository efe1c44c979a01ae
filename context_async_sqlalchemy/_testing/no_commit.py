"""Nothing ends the transaction of a test but its end: COMMIT and ROLLBACK are refused."""

import re
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from sqlalchemy.exc import InvalidRequestError

from context_async_sqlalchemy._engine.private_names import call_in_thread

ENDED = (
    "The transaction of the test was ended by a COMMIT or a ROLLBACK that did not go through "
    "SQLAlchemy, and with it went all that the test had written. Use 'await session.commit()' and "
    "'await session.rollback()', which keep or undo a part of it."
)

# PostgreSQL runs the query of such a cursor at COMMIT, whoever sends that, and fails. With it goes
# PREPARE TRANSACTION. It must not know before: random() keeps it from working out the cast.
# https://www.postgresql.org/docs/current/sql-declare.html
NO_COMMIT = (
    "DECLARE context_async_sqlalchemy_no_commit CURSOR WITH HOLD FOR SELECT (CASE WHEN random() < 2"
    " THEN 'COMMIT in the transaction of a test, which is rolled back' END)::int"
)


def refuse_end(statement: str) -> None:
    """Raise if a statement would end the transaction; what begins otherwise is for the database."""
    if _END.match(statement):
        raise InvalidRequestError(
            "A COMMIT or ROLLBACK as text would end the transaction of the test, and what follows "
            "would be stored: use 'await session.commit()' and 'await session.rollback()'."
        )


def allow_end(driver: Any, allowed: bool) -> None:
    """Let SQLite end its transaction, or refuse to, whoever asks."""
    authorizer = None if allowed else _refuse_transaction
    _ask(driver.driver_connection, lambda sqlite: sqlite.set_authorizer(authorizer))


def has_ended(driver: Any) -> bool:
    """Return whether a connection that is not lost is outside of a transaction."""
    raw = driver.driver_connection
    if hasattr(raw, "is_in_transaction"):  # asyncpg's
        return not (raw.is_closed() or raw.is_in_transaction())
    if hasattr(raw, "info"):  # psycopg's
        return bool(raw.info.transaction_status.name == "IDLE")
    return not _ask(raw, lambda sqlite: sqlite.in_transaction)


def _ask(connection: Any, question: Callable[[Any], Any]) -> Any:
    """Ask the connection of sqlite3 in its own thread; the event loop waits for the answer."""
    # Asked from here, SQLite 3.53 waits for the statement that it executes there, which may wait
    # for the interpreter, to call the authorizer. This wait leaves the interpreter to it.
    answer: Future[Any] = Future()

    def ask(sqlite: Any) -> None:
        try:
            answer.set_result(question(sqlite))
        except Exception as error:
            answer.set_exception(error)

    call_in_thread(connection, ask)
    return answer.result()


def _refuse_transaction(action: int, *_: object) -> int:
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_TRANSACTION else sqlite3.SQLITE_OK


_END = re.compile(
    r"\s*(COMMIT|END|ABORT|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!(\s+(WORK|TRANSACTION))?\s+TO\b))\b",
    re.IGNORECASE,
)
