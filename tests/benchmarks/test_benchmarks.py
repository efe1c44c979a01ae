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
from benchmarks.goals import goals
from benchmarks.sections import SECTIONS
from benchmarks.served import load, server
from benchmarks.wire import tables

TABLES = "docs/benchmarks/tables.md"

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
    with_one = BY_KEY["ASGI: by hand"]
    without = BY_KEY["ASGI: by hand, AUTOCOMMIT"]._replace(
        routes=with_one.routes, around=with_one.around
    )
    async with tables(url) as connection:
        found = await differences_of(without, url, connection)
    assert len(found) == 4
    assert all(problem.endswith("sends [] around its work") for problem in found)


@pytest.mark.parametrize("disturbing", served.DISTURBANCES.values(), ids=served.DISTURBANCES)
async def test_a_served_contender_is_kept_busy(url: str, disturbing: str | None) -> None:
    def keep_busy() -> Any:
        with server("Starlette: this library", url, 5) as port:
            deadline, seconds = time.monotonic() + 60, 0.3
            while time.monotonic() < deadline:  # a busy machine may answer nothing in 0.3 s
                seen = load(port, "/insert", 2, seconds, disturbing=disturbing, settling=0.1)
                if seen["throughput"]:
                    break
                seconds *= 2
            return seen

    async with tables(url) as connection:
        seen = await asyncio.to_thread(keep_busy)
        assert await connection.fetchval("SELECT count(*) FROM bench_entry") > 0
    assert seen["throughput"] > 0, seen["failures"]
    assert 0 < seen["p50"] <= seen["p99"]


@pytest.mark.parametrize("names", [[], ["trips"], ["cpu"], ["p99", "throughput"]])
def test_an_interrupted_run_makes_a_part_of_the_pages(names: list[str]) -> None:
    results = json.loads(report.RESULTS.read_text())
    names = [name for name in names if name in results["figures"]]
    results["figures"] = {name: results["figures"][name] for name in names}
    files = report.render(results)
    sections = [section for section in SECTIONS if section.name in names]
    assert [f"## {section.title}\n" in files[TABLES] for section in sections] == [True] * len(names)
    assert ("(benchmarks/cpu.svg)" in files["docs/benchmarks.md"]) == ("cpu" in names)
    assert len(files) == 2 + sum(bool(section.plot) for section in sections)
    goals(results)


def test_the_page_and_the_plots_are_those_of_the_committed_results() -> None:
    for path, content in report.render(json.loads(report.RESULTS.read_text())).items():
        assert (report.ROOT / path).read_text() == content, f"run {report.COMMAND}"


def test_the_page_begins_with_the_plot_and_how_to_read_it() -> None:
    page = report.render(json.loads(report.RESULTS.read_text()))["docs/benchmarks.md"]
    assert page.startswith("# Benchmarks\n\n![CPU time")
    assert page.index("A bar is") < page.index("A request with one INSERT")
