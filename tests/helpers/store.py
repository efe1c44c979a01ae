"""A database with the table of items, on any driver."""

from __future__ import annotations

from dataclasses import dataclass

from context_async_sqlalchemy import DBConnect
from tests.helpers.programs import Outside


@dataclass
class Store:
    """A connect to a database, and a view of what is committed in it."""

    driver: str
    connect: DBConnect
    outside: Outside

    async def names(self) -> list[str]:
        """Return the names of the committed items, in the order they were made."""
        return list(await self.outside.rows("SELECT name FROM item ORDER BY id"))
