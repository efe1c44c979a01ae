"""The same tests on real transactions, and tests that need these."""

from __future__ import annotations

import asyncio

import httpx
from sqlalchemy.ext.asyncio import AsyncSession

from examples.fastapi_example.tests.transactional.test_workflows import *  # noqa: F403
from examples.fastapi_example.tests.transactional.test_workflows import stored
from examples.workflows.database import connect


async def test_concurrent_queries_have_connections_of_their_own(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    assert connect.pool_status().checked_in == 1
    response = await client.post("/concurrent_queries")
    assert response.status_code == 200
    assert connect.pool_status().checked_in == 2


async def test_requests_at_the_same_time_are_transactions_of_their_own(
    client: httpx.AsyncClient, session: AsyncSession
) -> None:
    paths = ["/simple_usage", "/rollback_by_status_code", "/rollback_by_exception"]
    responses = await asyncio.gather(*(client.post(path) for path in paths))
    assert [response.status_code for response in responses] == [200, 409, 500]
    assert await stored(session) == ["by the handler", "by a function that it calls"]
