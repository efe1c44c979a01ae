"""What observes the outcome of a request sees a commit that fails."""

from __future__ import annotations

import asyncio
import re
import sys

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from sqlalchemy import insert

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.database import Database
from tests.helpers.models import Seat
from tests.helpers.programs import ROOT
from tests.helpers.serving import http_client
from tests.works_with.conftest import Serve


async def counts(client: httpx.AsyncClient) -> dict[str, float]:
    """Return how often each status of a POST was counted."""
    metrics = (await client.get("/metrics")).text
    counted = re.findall(
        r'^http_requests_total\{.*method="POST",status="(\w+)"\} (.*)$', metrics, re.MULTILINE
    )
    return {status: float(count) for status, count in counted}


async def test_metrics_that_are_added_after_count_a_commit_that_fails_as_a_500(
    serve_program: Serve,
) -> None:
    async with serve_program("works_with.observed") as program:
        assert (await program.client.post("/seats/1")).status_code == 201
        for _ in range(3):
            assert (await program.client.post("/seats/1")).status_code == 500
        assert await counts(program.client) == {"2xx": 1, "5xx": 3}


async def test_metrics_that_are_added_before_take_it_for_a_success(serve_program: Serve) -> None:
    async with serve_program("works_with.observed") as program:
        app = FastAPI()
        Instrumentator(registry=CollectorRegistry()).instrument(app).expose(app)
        add_fastapi_http_db_session_middleware(app)
        app.post("/seats/{number}")(program.book)
        assert (await program.client.post("/seats/1")).status_code == 201
        async with http_client(app, log_level="critical") as client:
            for _ in range(3):
                assert (await client.post("/seats/1")).status_code == 500
            assert await counts(client) == {"2xx": 3}


async def test_sentry_is_told_once_of_a_commit_that_fails_whenever_it_is_started(
    postgresql: str, database: Database
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.works_with.sentry_program", postgresql),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    told = ["succeeds 200", "raises 500 RuntimeError", "fails 500 IntegrityError"]
    assert output.decode().splitlines() == 2 * told
    assert await database.names() == ["before succeeds", "after succeeds"]


@pytest.mark.parametrize("place", ["before", "after"])
async def test_the_span_of_a_request_has_the_status_of_a_commit_that_fails(
    connect: DBConnect, place: str
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = FastAPI()
    if place == "before":
        FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    add_fastapi_http_db_session_middleware(app)
    if place == "after":
        FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)

    @app.post("/seats")
    async def book_twice() -> None:
        session = await db_session(connect)
        await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])

    async with http_client(app, log_level="critical") as client:
        assert (await client.post("/seats")).status_code == 500
    roots = [dict(s.attributes or {}) for s in exporter.get_finished_spans() if s.parent is None]
    assert [root["http.status_code"] for root in roots] == [500]
    FastAPIInstrumentor.uninstrument_app(app)
    provider.shutdown()
