"""Load the programs of the how-to pages, and look at what they have done."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from context_async_sqlalchemy import DBConnect

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "examples/how_to").glob("[!_]*.py"))


def load_program(monkeypatch: pytest.MonkeyPatch, name: str, **environment: str) -> Any:
    """Import a program anew, with environment variables.

    Args:
        monkeypatch: The fixture.
        name: A program of the how-to pages, or another module under `examples`.
        **environment: The variables.
    """
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    module = f"how_to.{name}" if name in PROGRAMS else name
    return importlib.reload(importlib.import_module(f"examples.{module}"))


def connects_of(program: Any) -> list[DBConnect]:
    """Return every connect of a program."""
    return [value for value in vars(program).values() if isinstance(value, DBConnect)]


def is_all_closed(program: Any) -> bool:
    """Return whether the program has closed each of its connects."""
    return all(connect.engine is None for connect in connects_of(program))


class Outside:
    """The database of a program, seen through separate connections."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = create_async_engine(url, poolclass=NullPool)

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[AsyncConnection]:
        """Yield a connection in a transaction, committed at the end."""
        async with self._engine.begin() as connection:
            yield connection

    async def rows(self, query: str) -> Sequence[Any]:
        """Return the rows of a query; for a query of one column, its values."""
        async with self.connection() as connection:
            rows = (await connection.execute(text(query))).all()
        return [row[0] if len(row) == 1 else tuple(row) for row in rows]


async def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition, async or not, is true, and return its value."""
    async with asyncio.timeout(30):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.01)
