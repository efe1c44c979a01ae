"""What the model of `tests/faults/test_model.py` knows of contexts, sessions and savepoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Token
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from hypothesis import strategies as st
from hypothesis.stateful import rule
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from tests.helpers.models import Item


class StumbleError(Exception):
    """What a program raises."""


@dataclass(eq=False)
class Work:
    """A session, and what must be in it.

    Attributes:
        levels: The names written by its transaction, then by each savepoint in it; empty if no
            transaction is open.
        unflushed: Whether something was added that is not flushed yet.
        savepoints: SQLAlchemy's, and the names of those that were written as SQL.
        connected: Whether it has a connection.
    """

    database: int
    session: AsyncSession
    levels: list[set[str]] = field(default_factory=list)
    savepoints: list[AsyncSessionTransaction | str] = field(default_factory=list)
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

    async def execute(self, sql: str) -> None:
        """Run SQL that SQLAlchemy does not look into."""
        self.begin()
        await self.session.flush()
        self.flush()
        await self.session.execute(text(sql))
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
        def run(self: Any, *args: Any, **kwargs: Any) -> None:
            self.runner.run(method(self, *args, **kwargs), context=self.context)

        decorated: Callable[..., None] = cast("Any", rule)(**arguments)(run)
        return decorated

    return decorate


def one_of(choices: Callable[[Any], Sequence[int]]) -> st.SearchStrategy[int]:
    """Choose one of what the machine's state offers."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


def some_of(choices: Callable[[Any], Sequence[int]]) -> st.SearchStrategy[list[int]]:
    """Choose one or more of what the machine's state offers."""
    return st.runner().flatmap(
        lambda machine: st.lists(st.sampled_from(choices(machine)), min_size=1, unique=True)
    )
