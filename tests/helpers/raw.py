"""The connection of a driver, below SQLAlchemy."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession


async def raw_of(session: AsyncSession) -> Any:
    """Return the driver's own connection of a session, on which a transaction is open."""
    return (await (await session.connection()).get_raw_connection()).driver_connection


def driver_of(session: AsyncSession) -> str:
    """Return the name of the driver of a session."""
    return str(session.get_bind().dialect.driver)
