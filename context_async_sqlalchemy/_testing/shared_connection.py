"""One connection in one transaction, lent to many, each with its own savepoint."""

import asyncio
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.private_names import await_only, greenlet_spawn, in_greenlet
from context_async_sqlalchemy._engine.shield import keep, run_to_completion
from context_async_sqlalchemy._testing.lent_connection import LentConnection
from context_async_sqlalchemy._testing.no_commit import ENDED, NO_COMMIT, allow_end, has_ended
from context_async_sqlalchemy._testing.turns import Turns


class SharedConnection:
    """A connection in a transaction that is never committed.

    It is lent as `LentConnection`s. Each has a savepoint as its transaction, inside that of the one
    that had the turn before, for which it waits up to `timeout` seconds.
    """

    def __init__(self, connection: AsyncConnection, timeout: float) -> None:
        self.driver: Any = None  # the connection, as SQLAlchemy adapts it
        self.turns = Turns(timeout)
        self._info: dict[Any, Any] = {}
        self._connection = connection
        self._lock = asyncio.Lock()
        self._undoing: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._autocommit = False
        self._is_lost = False
        self._checks_at_commit = False
        self.has_ended_early = False  # known at the end

    async def begin(self) -> None:
        """Begin the transaction."""
        fairy = await self._connection.get_raw_connection()
        driver: Any = fairy.dbapi_connection
        dialect = self._connection.dialect
        is_sqlite = dialect.name == "sqlite"
        self._autocommit = (
            driver.isolation_level is None if is_sqlite else getattr(driver, "autocommit", False)
        )
        if self._autocommit and not is_sqlite:
            # Otherwise there would be no transaction to roll back.
            level = dialect.default_isolation_level
            await self._connection.execution_options(isolation_level=level)
        self.driver, self._info = driver, dict(fairy.info)
        # Other drivers send BEGIN themselves, but not for what bypasses SQLAlchemy, such as COPY.
        await greenlet_spawn(self.execute, "BEGIN" if is_sqlite else NO_COMMIT)
        if is_sqlite:
            allow_end(driver, False)

    async def end(self) -> None:
        """Roll everything back; further use is refused."""
        self.turns.stop()
        try:
            self.has_ended_early = has_ended(self.driver)
            if self._undoing:
                await asyncio.wait(self._undoing)
            if self.turns.open:
                # A task has outlived the test, and may be inside a statement.
                await self._connection.invalidate()
            else:
                if self._connection.dialect.name == "sqlite":
                    allow_end(self.driver, True)
                await greenlet_spawn(self.driver.rollback)
        except Exception:
            logger.exception("The transaction of a test failed to roll back")
            await self._connection.invalidate()

    # SQLAlchemy calls the rest, inside its greenlet.

    def lend(self, entry: ConnectionPoolEntry) -> LentConnection:
        """Return a part of the connection; used as the creator of a pool."""
        if asyncio.get_running_loop() is not self._loop:
            raise InvalidRequestError(_OTHER_LOOP)
        entry.info.update(self._info)
        return LentConnection(self, self._autocommit)

    def enter(self, lent: LentConnection) -> None:
        """Wait until `lent` may execute a statement; before its first one, set its savepoint."""
        self._check(lent)
        if not lent.has_begun:
            self.turns.wait_to_begin()
            self._check(lent)
            self._begin(lent)
            return
        self.turns.wait_for(lent)
        self._check(lent)
        if lent.autocommit:
            with self._alone():
                self._store(lent)
            self._begin(lent)

    def end_statement(self, lent: LentConnection) -> None:
        """Give the turn back between two statements in AUTOCOMMIT, as they hold no lock."""
        if lent.autocommit and self.turns.has(lent):
            with self._alone():
                if self.turns.has(lent) and not has_ended(self.driver):
                    self._store(lent)

    def keep_settings(self, lent: LentConnection, names: Iterable[str]) -> None:
        """Let PostgreSQL's settings with these names end with the transaction of `lent`."""
        self.enter(lent)
        calls = (
            f"format('pg_catalog.set_config(%L, %L, true)', '{n}', current_setting('{n}', true))"
            for n in names
        )
        lent.restores = "SELECT " + self.execute(f"SELECT concat_ws(', ', {', '.join(calls)})")[0]

    def commit(self, lent: LentConnection) -> None:
        """Make the work of `lent` part of the enclosing transaction."""
        if not lent.has_begun:
            return
        with self._alone():
            self._check(lent)
            # Transactions that began inside it go on.
            if self.turns.has(lent):
                self._check_constraints()
                self.execute(f"RELEASE SAVEPOINT {lent.savepoint}")
                if lent.restores:
                    self.execute(lent.restores)
            self.turns.end(lent)

    def rollback(self, lent: LentConnection) -> None:
        """Undo all work since the savepoint of `lent`, including that of those inside it."""
        if not lent.has_begun:
            return
        with self._alone():
            if lent not in self.turns.open or self.turns.have_ended:
                lent.has_begun = False
            elif has_ended(self.driver):
                self.turns.end(lent, and_inside=True)
            elif lent.autocommit:
                if self.turns.has(lent):
                    self._store(lent)
                else:  # as in a commit
                    self.turns.end(lent)
            else:
                self.execute(f"ROLLBACK TO SAVEPOINT {lent.savepoint}")
                self.turns.end(lent, and_inside=True)

    def discard(self, lent: LentConnection) -> None:
        """Undo the work of `lent`, whose task was cancelled, or which was garbage-collected."""
        if lent not in self.turns.open or self.turns.have_ended or lent.is_discarded:
            return
        lent.is_discarded = True
        task = keep(self._loop.create_task(greenlet_spawn(self._undo, lent)), self._undoing)
        if in_greenlet():
            await_only(run_to_completion(asyncio.wait([task])))

    def execute(self, statement: str) -> Any:
        """Execute a statement; return its first row, if any."""
        cursor = self.driver.cursor()
        try:
            cursor.execute(statement)
            return cursor.fetchone() if cursor.description else None
        finally:
            cursor.close()

    def _check(self, lent: LentConnection) -> None:
        if self.turns.have_ended:
            raise InvalidRequestError(_ENDED)
        if self._is_lost:
            raise InvalidRequestError(_LOST)
        if lent.has_begun and lent not in self.turns.open:
            raise InvalidRequestError(_UNDONE)
        if has_ended(self.driver):
            raise InvalidRequestError(ENDED)  # this statement would be stored

    def _begin(self, lent: LentConnection) -> None:
        lent.restores = ""
        # Take the turn before setting the savepoint, so that no other can begin meanwhile.
        self.turns.begin(lent)
        with self._alone():
            self._check(lent)
            try:
                self._set_savepoint(lent)
            except Exception:
                self.turns.end(lent)
                self._is_lost = True
                raise
            self._check(lent)

    def _set_savepoint(self, lent: LentConnection) -> None:
        statement = f"SAVEPOINT {lent.savepoint}"
        try:
            # A cancelled SAVEPOINT would abort the enclosing transaction.
            await_only(run_to_completion(greenlet_spawn(self.execute, statement)))
        except Exception:
            if len(self.turns.open) < 2:
                raise
            # A statement of the enclosing transaction has failed: it can only be rolled back now.
            around = self.turns.open[-2]
            self.execute(f"ROLLBACK TO SAVEPOINT {around.savepoint}")
            if not around.autocommit:
                self.turns.open.remove(around)
            self.execute(statement)
        if lent.readonly:
            self.execute("SET TRANSACTION READ ONLY")

    def _store(self, lent: LentConnection) -> None:
        """Keep the work of a statement in AUTOCOMMIT, unless it failed."""
        try:
            self.execute(f"RELEASE SAVEPOINT {lent.savepoint}")
        except Exception:
            self.execute(f"ROLLBACK TO SAVEPOINT {lent.savepoint}")
        self.turns.end(lent)

    def _undo(self, lent: LentConnection) -> None:
        with self._alone():
            if lent not in self.turns.open or self.turns.have_ended:
                return
            try:
                if has_ended(self.driver):
                    return
                self._roll_back_what_was_cancelled(lent)
            except Exception:
                self._is_lost = True
                logger.exception("A savepoint of a test's transaction failed to roll back")
            finally:
                self.turns.end(lent, and_inside=True)

    def _roll_back_what_was_cancelled(self, lent: LentConnection) -> None:
        try:
            self.execute("SAVEPOINT discard")
        except Exception:  # a statement has failed
            self.execute(f"ROLLBACK TO SAVEPOINT {lent.savepoint}")
            return
        # If a RELEASE was cancelled, the savepoint may or may not exist; naming one that does not
        # exist would abort the enclosing transaction.
        try:
            self.execute(f"ROLLBACK TO SAVEPOINT {lent.savepoint}")
        except Exception:
            self.execute("ROLLBACK TO SAVEPOINT discard")

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Keep others from setting or ending a savepoint meanwhile."""
        await_only(self._lock.acquire())
        try:
            yield
        finally:
            self._lock.release()

    def _check_constraints(self) -> None:
        """Let deferred constraints fail now: the COMMIT that would check them never comes."""
        if not self._checks_at_commit and self._connection.dialect.name == "postgresql":
            query = "SELECT count(*) FROM pg_constraint WHERE condeferrable"
            self._checks_at_commit = self.execute(query)[0] > 0
        if self._checks_at_commit:
            self.execute("SAVEPOINT constraints")
            self.execute("SET CONSTRAINTS ALL IMMEDIATE")
            self.execute("ROLLBACK TO SAVEPOINT constraints")


_ENDED = "The transaction of the test has ended: await every task before the end of the test."
_LOST = (
    "The connection of the test's transaction was lost, and with it all that the test has written."
)
_OTHER_LOOP = (
    "The transaction of this test was opened on another event loop than the one on which a "
    "connection is asked for."
)
_UNDONE = "The transaction around this one was rolled back, and this one with it."
