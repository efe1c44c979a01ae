"""Fixtures of the tests of engines."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from sqlalchemy import URL

from tests.helpers.database import Database, assert_clean
from tests.helpers.flight import Flown, opened
from tests.helpers.mocks import Creators


@pytest.fixture
def creators() -> Creators:
    return Creators()


@pytest_asyncio.fixture
async def flown(database_url: URL, database: Database) -> AsyncGenerator[Flown]:
    """Return a connect whose BEGIN rides with a statement, and its wire."""
    async with opened(database_url) as (connect, wire):
        yield connect, wire
        await assert_clean(connect, database)
