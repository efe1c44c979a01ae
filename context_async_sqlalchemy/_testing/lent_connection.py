"""What SQLAlchemy uses as a driver's connection, but is only a savepoint on one."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from context_async_sqlalchemy._engine.private_names import in_greenlet


class Lender(Protocol):
    """Sets and ends the savepoints on a connection.

    Attributes:
        driver: The connection, as SQLAlchemy adapts it.
    """

    driver: Any

    def enter(self, lent: LentConnection) -> None:
        """Let `lent` execute a statement."""

    def commit(self, lent: LentConnection) -> None:
        """Keep the work of `lent`."""

    def rollback(self, lent: LentConnection) -> None:
        """Undo the work of `lent`."""

    def discard(self, lent: LentConnection) -> None:
        """Undo the work of `lent`, at whatever point its task was."""

    def has_turn(self, lent: LentConnection) -> bool:
        """Return whether a statement that the driver is executing belongs to `lent`."""


class LentConnection:
    """A part of a connection, with the methods of one (PEP 249).

    Args:
        lender: Has the connection.
        autocommit: Whether each statement is its own transaction.

    Attributes:
        depth: How many other savepoints enclose this one.
        has_begun: Whether its savepoint was set.
        is_discarded: Whether its savepoint is being undone.
        readonly: Whether its transaction is read-only.
    """

    def __init__(self, lender: Lender, autocommit: bool) -> None:
        self.autocommit = autocommit
        self.depth = 0
        self.has_begun = False
        self.is_discarded = False
        self.readonly = False
        self.deferrable = False
        self._lender = lender

    @property
    def savepoint(self) -> str:
        return f"shared_{self.depth}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lender.driver, name)

    @property
    def _execute_mutex(self) -> asyncio.Lock | None:
        # While another session runs a statement, this session is not inside one.
        is_its_turn = self._lender.has_turn(self)
        return getattr(self._lender.driver, "_execute_mutex", None) if is_its_turn else None

    def cursor(self, *args: Any, **options: Any) -> Any:
        self._lender.enter(self)
        return self._lender.driver.cursor(*args, **options)

    def commit(self) -> None:
        self._lender.commit(self)

    def rollback(self) -> None:
        self._lender.rollback(self)

    def close(self) -> None:
        if in_greenlet():
            self._lender.rollback(self)
        else:
            self._lender.discard(self)

    def terminate(self) -> None:
        self._lender.discard(self)

    # How SQLAlchemy sets the properties of a transaction, under the names of asyncpg, psycopg and
    # sqlite3. The shared transaction has begun: a level only matters as AUTOCOMMIT, or not.

    def set_isolation_level(self, level: object) -> None:
        if isinstance(level, str):  # psycopg's are not
            self.autocommit = level == "autocommit"

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    def set_read_only(self, value: bool) -> None:
        self.readonly = value

    def set_deferrable(self, value: bool) -> None:
        self.deferrable = value

    @property
    def isolation_level(self) -> str | None:
        return None if self.autocommit else ""

    @isolation_level.setter
    def isolation_level(self, level: str | None) -> None:
        self.autocommit = level is None
