"""The class of the sessions that a connect makes, for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncSession

if TYPE_CHECKING:
    # A default of a type variable is new in Python 3.13.
    from typing_extensions import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession, default=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, default=AsyncSession, covariant=True)
else:
    from typing import TypeVar

    SessionT = TypeVar("SessionT", bound=AsyncSession)
    SessionT_co = TypeVar("SessionT_co", bound=AsyncSession, covariant=True)
