"""What SQLAlchemy uses as a driver's connection, but is only a savepoint on one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from context_async_sqlalchemy._engine.private_names import in_greenlet, lock_of

if TYPE_CHECKING:
    from context_async_sqlalchemy._testing.shared_connection import SharedConnection


class LentConnection:
    """A part of a connection, with the methods of one (PEP 249)."""

    def __init__(self, shared: SharedConnection, autocommit: bool) -> None:
        self.autocommit = autocommit
        self.depth = 0  # how many other savepoints enclose its own
        self.has_begun = False  # its savepoint was set
        self.is_discarded = False  # its savepoint is being undone
        self.restores = ""  # a statement for the settings of the transaction around it
        self.readonly = False
        self.deferrable = False
        self._shared = shared

    @property
    def savepoint(self) -> str:
        return f"shared_{self.depth}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared.driver, name)

    @property
    def _execute_mutex(self) -> asyncio.Lock | None:
        # While another session runs a statement, this session is not inside one.
        is_its_turn = self._shared.turns.has(self)
        return lock_of(self._shared.driver) if is_its_turn else None

    @property
    def info(self) -> Any:  # psycopg's; the same
        return self._shared.driver.info if self._shared.turns.has(self) else None

    def cursor(self, *args: Any, **options: Any) -> Any:
        self._shared.enter(self)
        return self._shared.driver.cursor(*args, **options)

    def end_statement(self) -> None:
        self._shared.end_statement(self)

    def keep_settings(self, names: Iterable[str]) -> None:
        self._shared.keep_settings(self, names)

    def commit(self) -> None:
        self._shared.commit(self)

    def rollback(self) -> None:
        self._shared.rollback(self)

    def close(self) -> None:
        if in_greenlet():
            self._shared.rollback(self)
        else:
            self._shared.discard(self)

    def terminate(self) -> None:
        self._shared.discard(self)

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
