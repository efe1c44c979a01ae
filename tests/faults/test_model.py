"""Random programs over the public API, checked against a model of what must be in the database.

`MODEL_EXAMPLES=2000` runs more programs than a normal test run has time for.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing, suppress
from contextvars import Token, copy_context
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    run_state_machine_as_test,
)
from sqlalchemy import Table, event, insert, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.schema import CreateTable

from context_async_sqlalchemy import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    db_session,
    init_db_session_ctx,
    is_context_initiated,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
)
from tests.helpers.connections import connections_out
from tests.helpers.model import StumbleError, Unit, Work, one_of, some_of, step
from tests.helpers.models import Item
from tests.helpers.raw import raw_of

DATABASES = range(3)
MAX_DEPTH = 3

End = Literal["commit", "rollback", "close"]
END_ONE = {"commit": commit_db_session, "rollback": rollback_db_session, "close": close_db_session}
END_ALL = {
    "commit": commit_all_sessions,
    "rollback": rollback_all_sessions,
    "close": close_all_sessions,
}


def test_what_is_in_the_database_is_what_a_program_has_committed() -> None:
    # Hypothesis would derandomize it on a CI server; each run should try other programs.
    examples = int(os.environ.get("MODEL_EXAMPLES", "60"))
    run_state_machine_as_test(
        Programs,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, derandomize=False
        ),
    )


class Programs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        directory = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.runner = self.cleanup.enter_context(asyncio.Runner())
        self.context = copy_context()
        files = [directory / f"{database}.db" for database in DATABASES]
        self.observers = [self.cleanup.enter_context(closing(sqlite3.connect(f))) for f in files]
        for observer in self.observers:
            observer.execute(str(CreateTable(cast("Table", Item.__table__))))
        self.connects = [self.runner.run(open_connect(file)) for file in files]

        self.stack: list[Unit] = []
        self.ended: list[Work] = []
        self.committed: list[set[str]] = [set() for _ in DATABASES]
        self.numbers = map(str, itertools.count(1))

    @property
    def top(self) -> Unit:
        return self.stack[-1]

    def working(self) -> list[Work]:
        return [work for unit in self.stack for work in unit.works if work.levels]

    # A SQLite file has one writer at a time; a second one would wait in vain.

    def free(self) -> list[int]:
        """The databases with no open transaction."""
        taken = {work.database for work in self.working()}
        return [database for database in DATABASES if database not in taken]

    def usable(self) -> list[int]:
        """The databases on which no session but the context's own has a transaction."""
        if not self.stack:
            return []
        own = {work.database for work in self.top.current.values() if work.levels}
        return [database for database in DATABASES if database in own or database in self.free()]

    def closed_by_hand(self, database: int) -> Work | None:
        """The session that `db_session` no longer returns, but that may still be used."""
        closed = [w for w in self.top.works if w not in self.top.current.values()]
        return next((w for w in reversed(closed) if w.database == database), None)

    def in_savepoint(self) -> list[int]:
        current = self.top.current.values() if self.stack else ()
        return [work.database for work in current if work.savepoints]

    def outside_savepoints(self) -> list[int]:
        """The databases of `duplicable` without an open savepoint of SQLAlchemy's."""
        # What is left of one when SQLite has ended the transaction: tests/unit/test_truth_on_sqlite
        current = self.top.current if self.stack else {}
        return [d for d in self.duplicable() if d not in current or not current[d].savepoints]

    def duplicable(self) -> list[int]:
        return [database for database in self.usable() if self.committed[database]]

    async def work_on(self, database: int) -> Work:
        """Ask for the context's session, existing or new."""
        session = await db_session(self.connects[database])
        work = self.top.current.get(database)
        if work is None:
            known = [work for unit in self.stack for work in unit.works] + self.ended
            assert session not in [work.session for work in known]
            work = self.top.current[database] = Work(database, session)
            self.top.works.append(work)
        assert session is work.session
        return work

    def settle(self, work: Work, *, commit: bool) -> None:
        if commit:
            self.committed[work.database] |= work.names()
        work.levels.clear()
        work.savepoints.clear()
        work.unflushed = work.connected = False

    def settle_all(self, unit: Unit, *, commit: bool) -> None:
        for work in unit.works:
            self.settle(work, commit=commit)

    async def end(self, unit: Unit, *, fails: bool) -> None:
        """End a context, and with it contexts that were opened inside it and forgotten."""
        error = StumbleError()
        if isinstance(unit.opened, Token):
            await reset_db_session_ctx(unit.opened)
        elif fails:
            assert not await unit.opened.__aexit__(StumbleError, error, None)
        else:
            await unit.opened.__aexit__(None, None, None)
        commit = not (fails or isinstance(unit.opened, Token))
        while (inner := self.stack.pop()) is not unit:
            self.settle_all(inner, commit=False)
            self.ended += inner.works
        self.settle_all(unit, commit=commit)
        self.ended += unit.works

    async def write_to(
        self, databases: list[int], *, orm: bool = False, closed: bool = False
    ) -> None:
        for database in databases:
            work = self.closed_by_hand(database) if closed and database in self.free() else None
            await (work or await self.work_on(database)).write(next(self.numbers), orm=orm)

    async def check_that_outer_contexts_cannot_end_first(self) -> None:
        for unit in self.stack[:-1]:
            if isinstance(unit.opened, Token):
                with pytest.raises(ValueError, match="end an inner context before"):
                    await reset_db_session_ctx(unit.opened)

    async def check_that_ended_sessions_are_refused(self) -> None:
        for work in self.ended:
            with pytest.raises(ContextClosedError):
                await work.session.execute(select(Item.name))

    # Contexts

    @initialize(by_hand=st.booleans())
    def open_first_context(self, by_hand: bool) -> None:
        # Otherwise most programs would have none: Hypothesis leaves some rules out of each.
        self.open_context(by_hand)

    @precondition(lambda self: len(self.stack) < MAX_DEPTH)
    @step(by_hand=st.booleans())
    async def open_context(self, by_hand: bool) -> None:
        if by_hand:
            self.stack.append(Unit(init_db_session_ctx(force=True)))
        else:
            manager = new_db_session_ctx()
            await manager.__aenter__()
            self.stack.append(Unit(manager))

    @precondition(lambda self: self.stack)
    @step(
        databases=some_of(lambda _: DATABASES),
        closed=st.booleans(),
        fails=st.booleans(),
        forgets=st.booleans(),
    )
    async def end_context(
        self, databases: list[int], closed: bool, fails: bool, forgets: bool
    ) -> None:
        """End a context; or the block around it, forgetting one that was opened by hand."""
        await self.write_to([d for d in databases if d in self.usable()], closed=closed)
        await self.check_that_outer_contexts_cannot_end_first()
        by_hand = [isinstance(unit.opened, Token) for unit in self.stack[-2:]]
        forgets = forgets and by_hand == [False, True]
        await self.end(self.stack[-2] if forgets else self.top, fails=fails)
        await self.check_that_ended_sessions_are_refused()
        if not self.stack:
            with pytest.raises(ContextNotInitiatedError):
                await db_session(self.connects[0])

    @precondition(lambda self: self.free())
    @step(
        database=one_of(lambda self: self.free()),
        fails=st.booleans(),
        in_context=st.booleans(),
    )
    async def write_elsewhere(self, database: int, fails: bool, in_context: bool) -> None:
        """Write in a new context, or in none."""
        connect, name = self.connects[database], next(self.numbers)

        async def write(session: AsyncSession) -> None:
            await session.execute(insert(Item).values(name=name))
            if fails:
                raise StumbleError

        async def write_in_context() -> None:
            await write(await db_session(connect))

        with suppress(StumbleError):
            if in_context:
                await run_in_new_ctx(write_in_context)
            else:
                async with new_non_ctx_atomic_session(connect) as session:
                    await write(session)
            assert not fails
            self.committed[database].add(name)

    # The session of a context

    @precondition(lambda self: self.usable())
    @step(databases=some_of(lambda self: self.usable()), orm=st.booleans(), closed=st.booleans())
    async def write(self, databases: list[int], orm: bool, closed: bool) -> None:
        await self.write_to(databases, orm=orm, closed=closed)

    @precondition(lambda self: self.usable())
    @step(database=one_of(lambda self: self.usable()))
    async def read(self, database: int) -> None:
        work = await self.work_on(database)
        names = set(await work.session.scalars(select(Item.name)))
        work.begin()
        work.connected, work.unflushed = True, False
        assert names == self.committed[database] | work.names()

    @precondition(lambda self: self.usable())
    @step(database=one_of(lambda self: self.usable()), orm=st.booleans(), in_sql=st.booleans())
    async def begin_savepoint(self, database: int, orm: bool, in_sql: bool) -> None:
        work = await self.work_on(database)
        if in_sql:
            work.savepoints.append(f"savepoint_{next(self.numbers)}")
            await work.execute(f"SAVEPOINT {work.savepoints[-1]}")
        else:
            work.savepoints.append(await work.session.begin_nested())
            work.begin()
            work.flush()
        work.levels.append(set())
        await work.write(next(self.numbers), orm=orm)

    @precondition(lambda self: self.in_savepoint())
    @step(database=one_of(lambda self: self.in_savepoint()), fails=st.booleans())
    async def end_savepoint(self, database: int, fails: bool) -> None:
        work = self.top.current[database]
        savepoint = work.savepoints.pop()
        if isinstance(savepoint, str):
            if fails:
                await work.execute(f"ROLLBACK TO {savepoint}")  # it is still there
                work.levels[-1].clear()
            await work.execute(f"RELEASE {savepoint}")
            names = work.levels.pop()
            work.levels[-1] |= names
            return
        names = work.levels.pop()
        if fails:
            await savepoint.rollback()
            work.unflushed = False
        else:
            await savepoint.commit()
            work.levels[-1] |= names
            work.flush()

    @precondition(lambda self: self.duplicable())
    @step(
        database=one_of(lambda self: self.duplicable()),
        at_the_driver=st.booleans(),
        in_savepoint=st.booleans(),
    )
    async def swallow_a_failure(
        self, database: int, at_the_driver: bool, in_savepoint: bool
    ) -> None:
        """Go on after an error of which SQLite undoes the statement only."""
        work = await self.work_on(database)
        await work.write(next(self.numbers))
        await work.execute("SELECT 1")  # flushed
        with suppress(SQLAlchemyError, StumbleError):
            if in_savepoint:
                async with work.session.begin_nested():
                    await self.violate_a_constraint(work, "ABORT", at_the_driver)
            else:
                await self.violate_a_constraint(work, "ABORT", at_the_driver)

    @precondition(lambda self: self.outside_savepoints())
    @step(
        database=one_of(lambda self: self.outside_savepoints()),
        at_the_driver=st.booleans(),
        in_savepoint=st.booleans(),
        goes_on=st.booleans(),
        how=st.sampled_from(["commit", "commit by hand", "commit all", "rollback", "close"]),
    )
    async def swallow_the_end_of_a_transaction(
        self, database: int, at_the_driver: bool, in_savepoint: bool, goes_on: bool, how: str
    ) -> None:
        """Go on after an error with which SQLite has ended the transaction: nothing of it stays."""
        work = await self.work_on(database)
        await work.write(next(self.numbers))
        await work.execute("SELECT 1")  # flushed
        with suppress(SQLAlchemyError, StumbleError):
            if in_savepoint:
                async with work.session.begin_nested():
                    await self.violate_a_constraint(work, "ROLLBACK", at_the_driver)
            else:
                await self.violate_a_constraint(work, "ROLLBACK", at_the_driver)
        if goes_on:
            with suppress(SQLAlchemyError):  # a savepoint of SQLAlchemy's may be gone
                await work.write(next(self.numbers))
        connect = self.connects[database]
        if how == "commit all" and [w for w in self.top.works if w.levels] != [work]:
            how = "commit"  # otherwise those that come first are committed
        commits: dict[str, Callable[[], Awaitable[None]]] = {
            "commit": lambda: commit_db_session(connect),
            "commit by hand": work.session.commit,
            "commit all": commit_all_sessions,
        }
        if how in commits:
            with pytest.raises(SQLAlchemyError):
                await commits[how]()
            assert self.rows() == self.committed
            await rollback_db_session(connect)
        else:
            await END_ONE[cast("End", how)](connect)
        self.settle(work, commit=False)
        if how == "close":
            del self.top.current[database]

    async def violate_a_constraint(self, work: Work, what: str, at_the_driver: bool) -> None:
        name = min(self.committed[work.database])
        statement = f"INSERT OR {what} INTO item (name) VALUES ('{name}')"
        with pytest.raises((IntegrityError, sqlite3.IntegrityError)):
            if at_the_driver:
                await (await raw_of(work.session)).execute(statement)
            else:
                await work.session.execute(text(statement))
        raise StumbleError

    # These write first: otherwise most programs would have nothing to end.

    @precondition(lambda self: self.usable())
    @step(
        databases=some_of(lambda self: self.usable()),
        orm=st.booleans(),
        how=st.sampled_from(["commit", "rollback", "close"]),
    )
    async def end_transaction(self, databases: list[int], orm: bool, how: End) -> None:
        await self.write_to(databases, orm=orm)
        database = databases[0]
        await END_ONE[how](self.connects[database])
        self.settle(self.top.current[database], commit=how == "commit")
        if how == "close":
            del self.top.current[database]

    @precondition(lambda self: self.usable())
    @step(
        databases=some_of(lambda self: self.usable()),
        closed=st.booleans(),
        how=st.sampled_from(["commit", "rollback", "close", 399, 400]),
    )
    async def end_all_transactions(
        self, databases: list[int], closed: bool, how: End | int
    ) -> None:
        await self.write_to(databases, closed=closed)
        if isinstance(how, int):
            await auto_commit_by_status_code(how)
        else:
            await END_ALL[how]()
        self.settle_all(self.top, commit=how in ("commit", 399))
        if how == "close":
            self.top.current.clear()

    @precondition(lambda self: self.duplicable())
    @step(
        database=one_of(lambda self: self.duplicable()),
        others=some_of(lambda self: self.usable()),
    )
    async def fail_to_commit(self, database: int, others: list[int]) -> None:
        await self.write_to(others)
        session = (await self.work_on(database)).session
        session.add(Item(name=min(self.committed[database])))
        with pytest.raises(IntegrityError):
            await commit_all_sessions()
        self.settle_all(self.top, commit=False)

    @precondition(lambda self: self.usable())
    @step(
        database=one_of(lambda self: self.usable()),
        mode=st.sampled_from(["commit", "rollback", "append", "raise"]),
        fails=st.booleans(),
        before=st.booleans(),
    )
    async def write_atomically(self, database: int, mode: Any, fails: bool, before: bool) -> None:
        work = await self.work_on(database)
        if before:
            await work.write(next(self.numbers))
        block = atomic_db_session(self.connects[database], mode)
        if mode == "raise" and work.levels:
            with pytest.raises(InvalidRequestError, match="open already"):
                await block.__aenter__()
            return
        if mode != "append":
            self.settle(work, commit=mode == "commit")
        with suppress(StumbleError):
            async with block as session:
                assert session is work.session
                await work.write(next(self.numbers), orm=not fails)
                if fails:
                    raise StumbleError
        self.settle(work, commit=not fails)

    @invariant()
    def the_database_and_the_pools_are_as_they_must_be(self) -> None:
        assert self.rows() == self.committed
        works = [work for unit in self.stack for work in unit.works]
        assert [w.session.in_transaction() for w in works] == [bool(w.levels) for w in works]
        # A connection is held from the first statement to the end of the transaction.
        held = [w.database for w in works if w.connected]
        assert [connections_out(c) for c in self.connects] == [held.count(d) for d in DATABASES]
        assert self.context.run(is_context_initiated) == bool(self.stack)

    def rows(self) -> list[set[str]]:
        rows = [observer.execute("SELECT name FROM item") for observer in self.observers]
        return [{name for (name,) in found} for found in rows]

    def teardown(self) -> None:
        with self.cleanup:
            self.runner.run(self._end_everything(), context=self.context)
            assert self.rows() == self.committed

    async def _end_everything(self) -> None:
        try:
            while self.stack:
                await self.end(self.top, fails=False)
            assert not any(map(connections_out, self.connects))
        finally:
            for connect in self.connects:
                await connect.close()


async def open_connect(file: Path) -> DBConnect:
    connect: DBConnect = DBConnect.from_url(f"sqlite:///{file}")
    await connect.session_maker()
    assert connect.engine is not None
    event.listen(connect.engine.sync_engine, "connect", _prepare)
    return connect


def _prepare(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous = OFF")  # nothing here has to survive a power failure
    cursor.execute("PRAGMA busy_timeout = 0")  # nothing should have to wait for a lock
    cursor.close()
