"""Measure everything: `python -m benchmarks`, or `python -m benchmarks --quick`.

Uses its own PostgreSQL server (with fsync), or the one of BENCH_DATABASE_URL, which must allow 150
connections. First checks that all contenders do the same work. The full run writes `results.json`;
the quick one only prints.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from sqlalchemy import make_url

from benchmarks import in_process, layers, served, wire
from benchmarks.check import differences
from benchmarks.contenders import CONTENDERS
from benchmarks.run import Run
from benchmarks.sections import SECTIONS
from benchmarks.tables import reach_table, terminal_tables
from tests.helpers.postgres import free_port, new_server

RESULTS = Path(__file__).with_name("results.json")
PACKAGES = (
    "context-async-sqlalchemy",
    "SQLAlchemy",
    "asyncpg",
    "fastapi",
    "starlette",
    "uvicorn",
    "fastapi-async-sqlalchemy",
    "advanced-alchemy",
    "fastapi-sqla",
)


@contextmanager
def database() -> Generator[str]:
    """Yield the URL of the database to measure with."""
    url = os.environ.get("BENCH_DATABASE_URL")
    if url is not None:
        yield make_url(url).set(drivername="postgresql+asyncpg").render_as_string(False)
        return
    with new_server("127.0.0.1", free_port(), "-c fsync=on") as server:
        yield server.url


async def measure(run: Run) -> None:
    async with wire.tables(run.url) as connection:
        if problems := await differences(run.url, connection):
            raise SystemExit("\n".join(problems))
        await wire.measure_trips(run)
        await wire.measure_distance(run)
        async with in_process.all_apps(run) as apps:
            await in_process.measure_time(run, apps)
            await in_process.measure_memory(run, apps)
        await layers.measure_layers(run)
        await layers.measure_empty_layers(run)
        await in_process.measure_connects(run)
        await in_process.measure_calls(run)
        served.measure_start(run)
        served.measure_throughput(run)
        served.measure_disturbance(run)


def about(command: str, load: str) -> dict[str, Any]:
    """Return what the figures were measured on."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    return {
        "command": command,
        "machine": {
            "CPU": model,
            "cores": psutil.cpu_count(),
            "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
            "system": f"{platform.system()} {platform.machine()}",
            "load average before": load,
        },
        "versions": {"Python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def main() -> None:
    is_quick = "--quick" in sys.argv
    load = f"{os.getloadavg()[0]:.1f}"
    console = Console()
    for contender in CONTENDERS:
        if (obstacle := contender.obstacle()) is not None:
            console.print(f"[yellow]{contender.key} is left out: {obstacle}")
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with database() as url, Progress(*columns, console=console) as progress:
        run = Run(url, is_quick, progress)
        asyncio.run(measure(run))
    results = about("make bench-quick" if is_quick else "make bench", load) | {
        "figures": {
            section.name: run.figures(section.name, section.floor_of) for section in SECTIONS
        }
    }
    for table in terminal_tables(results):
        console.print(table)
    console.print(reach_table(results))
    if not is_quick:
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
