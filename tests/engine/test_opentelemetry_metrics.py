"""The pools are measured under the names of OpenTelemetry's conventions."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import URL, text

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from context_async_sqlalchemy.opentelemetry_metrics import measure_pools
from tests.helpers.database import Database
from tests.helpers.observed import forgetting_observers

PREFIX = "db.client.connection."


class Meter:
    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])

    def read(self) -> dict[str, Any]:
        """Return the points by their names, pools and states."""
        data: Any = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            " ".join(
                [metric.name.removeprefix(PREFIX), *map(str, point.attributes.values())]
            ): point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }

    def values(self) -> dict[str, int]:
        return {name: p.value for name, p in self.read().items() if hasattr(p, "value")}


@pytest.fixture
def meter() -> Generator[Meter]:
    meter = Meter()
    with forgetting_observers():
        yield meter
    meter.provider.shutdown()


async def test_a_pool_is_counted_when_it_is_read(
    database_url: URL, database: Database, meter: Meter
) -> None:
    async with DBConnect.from_url(database_url, pool_size=1, max_overflow=0) as connect:
        measure_pools({"shop": connect}, meter.provider)
        states = {"count shop idle": 0, "count shop used": 0, "pending_requests shop": 0}
        assert meter.values() == states  # no engine yet

        async def select() -> None:
            async with new_non_ctx_session(connect) as session:
                await session.execute(text("SELECT 1"))

        async with new_non_ctx_session(connect) as session:
            await session.connection()
            waiting = asyncio.create_task(select())
            async with asyncio.timeout(10):
                while not meter.values()["pending_requests shop"]:
                    await asyncio.sleep(0.001)
            assert meter.values() == states | {
                "count shop used": 1,
                "max shop": 1,
                "pending_requests shop": 1,
            }
            await asyncio.sleep(0.03)
        await waiting
        assert meter.values() == states | {"count shop idle": 1, "max shop": 1}
        points = meter.read()
        for name in ("wait_time", "use_time"):
            assert points[f"{name} shop"].count == 2
            assert 0.03 <= points[f"{name} shop"].sum < 10


async def test_pools_have_their_names_over_a_change_of_the_host(
    connect: DBConnect, second_connect: DBConnect, database: Database, meter: Meter
) -> None:
    measure_pools({"one": connect, "two": second_connect}, meter.provider)
    async with new_non_ctx_session(connect) as session:
        await session.connection()
        async with new_non_ctx_session(second_connect) as second:
            await second.connection()
        await connect.connect("localhost")
    points = meter.read()
    assert points["use_time one"].count == points["use_time two"].count == 1


async def test_another_engine_is_not_measured(sqlite_connect: DBConnect, meter: Meter) -> None:
    measure_pools({}, meter.provider)
    async with new_non_ctx_session(sqlite_connect) as session:
        await session.connection()
    assert meter.read() == {}
