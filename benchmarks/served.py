"""Measurements from outside: uvicorn serves each contender to a client in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.contenders import FLOOR, LEAST, LIBRARY, LIMIT, Contender, taking_part
from benchmarks.run import Run, rotated

ROOT = Path(__file__).parents[1]
CONCURRENCY = (1, 64, 256)
DISTURBANCES = {"undisturbed": None, "slow readers": "/body", "background tasks": "/background"}
QUICK_CLIENTS = 4
_OF_ASGI = (f"ASGI: {FLOOR}", f"ASGI: {LIBRARY}")


@contextmanager
def server(key: str, url: str, pool_size: int) -> Generator[int]:
    """Serve a contender; yields its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serve", key, str(pool_size)],
        cwd=ROOT,
        env=os.environ | {"BENCH_SERVED_URL": url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()  # SIGTERM would wait for requests that wait for a connection


def load(port: int, path: str, clients: int, seconds: float, **disturbance: Any) -> Any:
    """Keep a server busy; return what its clients saw."""
    arguments = {"port": port, "path": path, "clients": clients, "seconds": seconds} | disturbance
    command = [sys.executable, "-m", "benchmarks.client", json.dumps(arguments)]
    output = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, timeout=seconds + 60
    ).stdout
    seen = json.loads(output)
    assert not seen["failures"], seen
    return seen


def measure_throughput(run: Run) -> None:
    keys = _keys(lambda c: c.framework == "FastAPI" or c.key in _OF_ASGI)
    with ExitStack() as stack:
        ports = {key: stack.enter_context(server(key, run.url, 10)) for key in keys}
        for port in ports.values():
            load(port, "/insert", 8, 0.3)
        for concurrency in CONCURRENCY:
            for number in run.rounds(f"served: {concurrency} clients", 5):
                for key in rotated(keys, number):
                    seen = load(ports[key], "/insert", concurrency, run.seconds)
                    for section in ("throughput", "p50", "p99"):
                        run.add(section, key, str(concurrency), seen[section])


def measure_disturbance(run: Run) -> None:
    """Measure fast requests while others are slow without needing a connection."""
    keys = _keys(lambda c: (c.framework == "FastAPI" and c.name != LIMIT) or c.name == LIBRARY)
    with ExitStack() as stack:
        ports = {key: stack.enter_context(server(key, run.url, 5)) for key in keys}
        for port in ports.values():
            load(port, "/select", QUICK_CLIENTS, 0.3)
        for number in run.rounds("served: slow readers, background tasks", 2):
            # All contenders with one disturbance, then all with the next: by then it has ended.
            for name, path in DISTURBANCES.items():
                for key in rotated(keys, number):
                    disturbance = {"disturbing": path, "settling": run.seconds}
                    seen = load(ports[key], "/select", QUICK_CLIENTS, run.seconds, **disturbance)
                    run.add("disturbed", key, name, seen["throughput"])


def measure_start(run: Run) -> None:
    keys = _keys(lambda _: True)
    for number in run.rounds("start", 3):
        for key in rotated(keys, number):
            start = time.perf_counter()
            with server(key, run.url, 10):
                run.add("start", key, "until it listens", (time.perf_counter() - start) * 1e3)


def _keys(is_wanted: Callable[[Contender], bool]) -> list[str]:
    return [c.key for c in taking_part() if c.name != LEAST and is_wanted(c)]
