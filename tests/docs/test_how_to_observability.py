"""The program of the how-to page on observability, run."""

from __future__ import annotations

import asyncio
import importlib
import logging
import re
import sys
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import BackgroundTasks, FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from tests.helpers.asgi import add
from tests.helpers.models import Item
from tests.helpers.observed import forgetting_observers
from tests.helpers.programs import ROOT, until
from tests.helpers.serving import http_client

NAME = "examples.how_to.observability"


@pytest.fixture
def program(postgresql: str, monkeypatch: pytest.MonkeyPatch) -> Generator[Any]:
    monkeypatch.setenv("DATABASE_URL", postgresql)
    monkeypatch.setenv("LEAK_DETECTION_THRESHOLD", "0.05")
    # Not reloaded: SQLAlchemy is instrumented once.
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with forgetting_observers():
        program = importlib.import_module(NAME)
        yield program
    program.meter_provider.shutdown()
    FastAPIInstrumentor.uninstrument_app(program.app)
    SQLAlchemyInstrumentor().uninstrument()
    program.tracer_provider.shutdown()


@pytest_asyncio.fixture
async def client(program: Any) -> AsyncGenerator[httpx.AsyncClient]:
    async with http_client(program.app) as client:
        yield client
    assert program.connect.engine is None


class Traces:
    """The spans that have ended."""

    def __init__(self, program: Any) -> None:
        self._exporter = InMemorySpanExporter()
        program.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    async def have(self, request: str, *statements: str) -> None:
        """Check that there is one trace: that of a request, with these statements."""

        def statements_of(spans: Sequence[ReadableSpan]) -> list[object]:
            attributes = [span.attributes or {} for span in spans]
            return [a["db.statement"] for a in attributes if "db.statement" in a]

        def has_ended() -> bool:
            # The span of a request ends with its response, and a background task later.
            spans = self._exporter.get_finished_spans()
            roots = [span.name for span in spans if span.parent is None]
            return roots == [request] and len(statements_of(spans)) >= len(statements)

        await until(has_ended)
        spans = self._exporter.get_finished_spans()
        assert statements_of(spans) == list(statements)
        assert len({span.context.trace_id for span in spans}) == 1
        self._exporter.clear()


@pytest.fixture
def traces(program: Any) -> Traces:
    return Traces(program)


async def test_the_statements_of_a_request_and_its_tasks_share_its_trace(
    client: httpx.AsyncClient, traces: Traces
) -> None:
    # Each request has a trace of its own, even on the same connection to the server.
    for _ in range(2):
        assert (await client.get("/tables")).status_code == 200
        await traces.have(
            "GET /tables", "SELECT count(*) FROM pg_class", "SELECT count(*) FROM pg_type"
        )


async def test_the_statements_of_a_streamed_body_share_the_trace(
    client: httpx.AsyncClient, traces: Traces
) -> None:
    assert "int4" in (await client.get("/types")).text.splitlines()
    await traces.have("GET /types", "SELECT typname FROM pg_type")


async def test_the_statements_of_a_background_task_share_the_trace(
    client: httpx.AsyncClient, traces: Traces
) -> None:
    assert (await client.post("/analyze")).status_code == 202
    await traces.have("POST /analyze", "ANALYZE pg_type")


async def test_the_engine_of_another_host_is_instrumented_too(
    client: httpx.AsyncClient, program: Any, traces: Traces
) -> None:
    assert (await client.get("/rate")).status_code == 200
    await traces.have("GET /rate", "SELECT 100.0")
    engine = program.connect.engine
    await program.connect.connect("localhost")
    assert (await client.get("/rate")).status_code == 200
    assert program.connect.engine is not engine
    await traces.have("GET /rate", "SELECT 100.0")


async def test_the_pool_is_measured_when_prometheus_asks(
    client: httpx.AsyncClient, program: Any
) -> None:
    async def metrics() -> dict[str, float]:
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        lines = re.findall(r"^(db_pool\w+\{.*\}) (.+)$", response.text, re.MULTILINE)
        return {name: float(value) for name, value in lines}

    idle = 'db_pool_connections{database="shop",state="idle"}'
    used = 'db_pool_connections{database="shop",state="used"}'
    capacity = 'db_pool_capacity{database="shop"}'
    assert await metrics() == {idle: 0, used: 0}  # no engine yet
    sessions = [await program.connect.create_session() for _ in range(2)]
    for session in sessions:
        await session.connection()
    assert await metrics() == {idle: 0, used: 2, capacity: 15}
    for session in sessions:
        await session.close()
    assert await metrics() == {idle: 2, used: 0, capacity: 15}


async def test_a_request_with_many_statements_is_told_of(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    def is_told() -> bool:  # after the response
        return "GET /many sent 11 statements" in caplog.text

    with caplog.at_level(logging.WARNING, "shop"):
        assert (await client.get("/tables")).status_code == 200
        assert (await client.get("/many")).status_code == 200
        await until(is_told)
    assert [record.name for record in caplog.records].count("shop") == 1


async def test_what_holds_a_connection_meanwhile_is_named(
    client: httpx.AsyncClient,
    program: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def is_warned() -> bool:
        return "a connection has been held" in caplog.text

    async def be_slow() -> float:
        await until(is_warned)
        return 2.0

    monkeypatch.setattr(program, "ask_the_bank", be_slow)
    with caplog.at_level(logging.WARNING, "context_async_sqlalchemy"):
        assert (await client.get("/rate?key=secret")).json() == 200.0
    assert "by the request GET '/rate'; its session was made at " in caplog.text
    line = program.fetch_rate.__code__.co_firstlineno + 2
    assert f"{program.__file__}:{line}." in caplog.text
    assert "secret" not in caplog.text


def test_every_loop_has_an_engine_that_is_instrumented(program: Any, traces: Traces) -> None:
    async def request() -> None:
        async with http_client(program.app) as client:
            assert (await client.get("/rate")).status_code == 200
            await traces.have("GET /rate", "SELECT 100.0")

    asyncio.run(request())
    asyncio.run(request())


PAGE = ROOT / "docs/how-to/observability.md"


async def test_the_log_of_the_page_is_what_the_library_says(
    connect: DBConnect, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    @app.post("/orders", status_code=409)
    async def refuse() -> None:
        (await add(connect, "a", "b", "c")).add(Item(name="d"))

    async def write() -> None:
        await add(connect, "e")

    async def stumble() -> None:
        raise ValueError

    @app.post("/late")
    async def do_later(tasks: BackgroundTasks) -> None:
        tasks.add_task(write)
        tasks.add_task(stumble)

    caplog.set_level(logging.INFO, "context_async_sqlalchemy")
    async with http_client(app, log_level="critical") as client:
        await client.post("/orders?token=1")
        await client.post("/late")
    page = " ".join(PAGE.read_text().split())
    messages = [r.getMessage() for r in caplog.records if r.name == "context_async_sqlalchemy"]
    assert len(messages) == 2
    for message in messages:
        assert message.replace("/late", "/orders") in page
