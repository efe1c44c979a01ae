"""Measure everything, or what is named: `python -m benchmarks cpu trips`.

Uses its own PostgreSQL server (with fsync), or the one of BENCH_DATABASE_URL, which must allow 200
connections. First checks that all contenders do the same work. Writes `results.json` after each
measurement, so that an interrupted run leaves a part.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable, Generator
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
    "uvloop",
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


MEASURES: dict[str, Callable[[Run], Awaitable[None] | None]] = {
    "trips": wire.measure_trips,
    "cpu": in_process.measure_time,
    "distance": wire.measure_distance,
    "throughput": served.measure_throughput,
    "disturbed": served.measure_disturbance,
    "memory": in_process.measure_memory,
    "start": served.measure_start,
    "uvloop": in_process.measure_uvloop,
    "empty": layers.measure_empty_layers,
    "layers": layers.measure_layers,
}


async def measure(run: Run, names: list[str], save: Callable[[], None]) -> None:
    async with wire.tables(run.url) as connection:
        if problems := await differences(run.url, connection):
            raise SystemExit("\n".join(problems))
        for name in names:
            if (measuring := MEASURES[name](run)) is not None:
                await measuring
            save()


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
    parser = ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(MEASURES)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds; default: 1")
    parser.add_argument("--print", action="store_true", help="print only, as with names")
    arguments = parser.parse_args()
    names = arguments.names or list(MEASURES)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` interrupts it, too
    share = "" if arguments.share == 1 else f" SHARE={arguments.share:g}"
    results = about(f"make bench{share}", f"{os.getloadavg()[0]:.1f}")
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
        run = Run(url, arguments.share, progress)

        def save() -> None:
            results["figures"] = {
                section.name: run.figures(section.name, section.floor_of)
                for section in SECTIONS
                if section.name in run.samples
            }
            if results["figures"] and not (arguments.print or arguments.names):
                RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")

        try:
            asyncio.run(measure(run, names, save))
        finally:
            save()  # what there is, when it is interrupted
    for table in terminal_tables(results):
        console.print(table)
    console.print(reach_table(results))


if __name__ == "__main__":
    main()
