"""Random programs over the public API, checked against a model of what must be in the database.

`MODEL_EXAMPLES=2000` runs more programs than a normal test run has time for.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, closing, suppress
from contextvars import Token, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Table, event, insert, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
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
from tests.helpers.database import make_connect
from tests.helpers.models import Item

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


class StumbleError(Exception):
    """What a program raises."""


@dataclass(eq=False)
class Work:
    """A session, and what must be in it.

    Attributes:
        levels: The names written by its transaction, then by each savepoint in it; empty if no
            transaction is open.
        unflushed: Whether something was added that is not flushed yet.
        connected: Whether it has a connection.
    """

    database: int
    session: AsyncSession
    levels: list[set[str]] = field(default_factory=list)
    savepoints: list[AsyncSessionTransaction] = field(default_factory=list)
    unflushed: bool = False
    connected: bool = False

    def begin(self) -> None:
        if not self.levels:
            self.levels.append(set())

    def flush(self) -> None:
        self.connected |= self.unflushed
        self.unflushed = False

    def names(self) -> set[str]:
        return set().union(*self.levels)

    async def write(self, name: str, *, orm: bool = False) -> None:
        self.begin()
        self.levels[-1].add(name)
        if orm:
            self.session.add(Item(name=name))
            self.unflushed = True
        else:
            await self.session.execute(insert(Item).values(name=name))
            self.connected = True


@dataclass(eq=False)
class Unit:
    """A context: how to end it, the sessions `db_session` returns, and every one it has made."""

    opened: AbstractAsyncContextManager[None] | Token[Any]
    current: dict[int, Work] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)


AsyncMethod: TypeAlias = Callable[..., Coroutine[Any, Any, None]]


def step(**arguments: Any) -> Callable[[AsyncMethod], Callable[..., None]]:
    """Make an async method a rule. All of them run with one `contextvars.Context`."""

    def decorate(method: AsyncMethod) -> Callable[..., None]:
        @functools.wraps(method)
        def run(self: Programs, *args: Any, **kwargs: Any) -> None:
            self.runner.run(method(self, *args, **kwargs), context=self.context)

        decorated: Callable[..., None] = cast("Any", rule)(**arguments)(run)
        return decorated

    return decorate


def one_of(choices: Callable[[Programs], Sequence[int]]) -> st.SearchStrategy[int]:
    """Choose one of what the machine's state offers."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


def some_of(choices: Callable[[Programs], Sequence[int]]) -> st.SearchStrategy[list[int]]:
    """Choose one or more of what the machine's state offers."""
    return st.runner().flatmap(
        lambda machine: st.lists(st.sampled_from(choices(machine)), min_size=1, unique=True)
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
    @step(database=one_of(lambda self: self.usable()), orm=st.booleans())
    async def begin_savepoint(self, database: int, orm: bool) -> None:
        work = await self.work_on(database)
        work.savepoints.append(await work.session.begin_nested())
        work.begin()
        work.flush()
        work.levels.append(set())
        await work.write(next(self.numbers), orm=orm)

    @precondition(lambda self: self.in_savepoint())
    @step(database=one_of(lambda self: self.in_savepoint()), fails=st.booleans())
    async def end_savepoint(self, database: int, fails: bool) -> None:
        work = self.top.current[database]
        names, savepoint = work.levels.pop(), work.savepoints.pop()
        if fails:
            await savepoint.rollback()
            work.unflushed = False
        else:
            await savepoint.commit()
            work.levels[-1] |= names
            work.flush()

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
    connect = make_connect(f"sqlite+aiosqlite:///{file}")
    await connect.session_maker()
    assert connect.engine is not None
    # https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#serializable-isolation-savepoints-transactional-ddl
    event.listen(connect.engine.sync_engine, "connect", _prepare)
    event.listen(connect.engine.sync_engine, "begin", lambda c: c.exec_driver_sql("BEGIN"))
    return connect


def _prepare(connection: Any, _: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous = OFF")  # nothing here has to survive a power failure
    cursor.execute("PRAGMA busy_timeout = 0")  # nothing should have to wait for a lock
    cursor.close()
