"""The benchmarks compare the same work, and their page shows the committed results."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from sqlalchemy import URL

from benchmarks import report, served, work
from benchmarks.check import differences_of
from benchmarks.contenders import BY_KEY, CONTENDERS, Contender
from benchmarks.served import load, server
from benchmarks.wire import tables

# What the contenders themselves warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def url(database_url: URL) -> str:
    return database_url.render_as_string(hide_password=False)


@pytest.mark.parametrize("contender", CONTENDERS, ids=[c.key for c in CONTENDERS])
async def test_every_contender_does_the_same_work(contender: Contender, url: str) -> None:
    if (obstacle := contender.obstacle()) is not None:
        pytest.skip(obstacle)
    async with tables(url) as connection:
        assert await differences_of(contender, url, connection) == []


async def test_other_work_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(work.RAW_STEPS, work.write, work.raw_read)
    async with tables(url) as connection:
        found = await differences_of(BY_KEY["ASGI: raw asyncpg"], url, connection)
    assert [problem.split()[4] for problem in found] == ["answers", "sends", "rows"]


async def test_a_missing_transaction_is_told(url: str) -> None:
    without = BY_KEY["ASGI: by hand, AUTOCOMMIT"]._replace(name="without a transaction")
    async with tables(url) as connection:
        found = await differences_of(without, url, connection)
    assert len(found) == 4
    assert all(problem.endswith("sends [] around its work") for problem in found)


@pytest.mark.parametrize("disturbing", served.DISTURBANCES.values(), ids=served.DISTURBANCES)
async def test_a_served_contender_is_kept_busy(url: str, disturbing: str | None) -> None:
    def keep_busy() -> Any:
        with server("Starlette: this library", url, 5) as port:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:  # a busy machine may answer nothing in 0.3 s
                seen = load(port, "/insert", 2, 0.3, disturbing=disturbing, settling=0.1)
                if seen["throughput"]:
                    break
            return seen

    async with tables(url) as connection:
        seen = await asyncio.to_thread(keep_busy)
        assert await connection.fetchval("SELECT count(*) FROM bench_entry") > 0
    assert seen["throughput"] > 0, seen["failures"]
    assert 0 < seen["p50"] <= seen["p99"]


def test_the_page_and_the_plots_are_those_of_the_committed_results() -> None:
    for path, content in report.render(json.loads(report.RESULTS.read_text())).items():
        assert (report.ROOT / path).read_text() == content, f"run {report.COMMAND}"
