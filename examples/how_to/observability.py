"""Traces, metrics, leak detection and the reports of requests of a FastAPI application."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterator

from fastapi import BackgroundTasks, FastAPI, Response
from fastapi.responses import StreamingResponse
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import text

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from context_async_sqlalchemy.observability import (
    ASGIRequestReportMiddleware,
    RequestReport,
)
from context_async_sqlalchemy.opentelemetry_metrics import measure_pools

logger = logging.getLogger("shop")

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1/postgres"),
    os.environ.get("DATABASE_PASSWORD"),
    leak_detection_threshold=float(
        os.environ.get("LEAK_DETECTION_THRESHOLD", "5")
    ),
)

app = FastAPI(lifespan=database_lifespan(connect))
add_fastapi_http_db_session_middleware(app)

tracer_provider = TracerProvider()  # add your exporter's span processor to it
SQLAlchemyInstrumentor().instrument(
    tracer_provider=tracer_provider, skip_dep_check=True
)
FastAPIInstrumentor.instrument_app(
    app,
    tracer_provider=tracer_provider,
    excluded_urls="/metrics",
    exclude_spans=["receive", "send"],
)

meter_provider = MeterProvider()  # give it your exporter's metric reader
measure_pools({"shop": connect}, meter_provider)


def tell(report: RequestReport) -> None:
    if report.statements > 10:
        logger.warning(
            "%s %s sent %s statements",
            report.method,
            report.route,
            report.statements,
        )


app.add_middleware(
    ASGIRequestReportMiddleware, report=tell, slow_query_threshold=0.5
)


class PoolCollector(Collector):
    """Counts the connections in each pool when Prometheus scrapes."""

    def __init__(self, **connects: DBConnect) -> None:
        self._connects = connects

    def collect(self) -> Iterator[GaugeMetricFamily]:
        connections = GaugeMetricFamily(
            "db_pool_connections",
            "Connections by state",
            labels=["database", "state"],
        )
        capacity = GaugeMetricFamily(
            "db_pool_capacity",
            "Connections there can be at a time",
            labels=["database"],
        )
        for database, connect in self._connects.items():
            status = connect.pool_status()
            connections.add_metric([database, "idle"], status.checked_in)
            connections.add_metric([database, "used"], status.checked_out)
            if status.capacity is not None:
                capacity.add_metric([database], status.capacity)
        yield connections
        yield capacity


registry = CollectorRegistry()
registry.register(PoolCollector(shop=connect))


@app.get("/metrics")
async def metrics() -> Response:
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


async def count(table: str) -> int:
    session = await db_session(connect)
    return int(
        (
            await session.execute(text(f"SELECT count(*) FROM {table}"))
        ).scalar_one()
    )


@app.get("/tables")
async def count_both() -> list[int]:
    classes = asyncio.create_task(count("pg_class"))
    return [await classes, await count("pg_type")]


@app.get("/many")
async def count_many() -> list[int]:
    return [await count("pg_class") for _ in range(11)]


@app.get("/types")
async def stream_types() -> StreamingResponse:
    async def body() -> AsyncGenerator[str]:
        session = await db_session(connect)
        async for name in await session.stream_scalars(
            text("SELECT typname FROM pg_type")
        ):
            yield f"{name}\n"

    return StreamingResponse(body())


@app.post("/analyze", status_code=202)
async def analyze(tasks: BackgroundTasks) -> None:
    tasks.add_task(analyze_types)


async def analyze_types() -> None:
    session = await db_session(connect)
    await session.execute(text("ANALYZE pg_type"))


@app.get("/rate")
async def fetch_rate() -> float:
    session = await db_session(connect)
    amount = float((await session.execute(text("SELECT 100.0"))).scalar_one())
    return amount * await ask_the_bank()


async def ask_the_bank() -> float:
    return 1.08  # call a remote service here, which may be slow
