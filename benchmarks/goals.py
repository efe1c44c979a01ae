"""The goals: figures that this library is meant to reach, for those who work on it."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.contenders import (
    CONTENDERS,
    FLOOR,
    IN_FLIGHT,
    LEAST,
    LIBRARY,
    LIMIT,
    READ_ONLY,
    SETTINGS,
)

NOTHING = {"ASGI": 1.7, "Starlette": 1.15, "FastAPI": 1.1}
CPU = {"select": (0.9, 0.78), "insert": (0.9, 0.78), "change": (0.95, 0.88)}  # ; in the flight
_OURS = (LIBRARY, FLOOR, LEAST, LIMIT)
RIVALS = [c.key for c in CONTENDERS if not c.name.startswith(_OURS)]


class Goal(NamedTuple):
    """A figure and its goal."""

    what: str
    limit: float
    measured: float
    at_least: bool = False

    @property
    def is_reached(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def goals(results: Any) -> list[Goal]:
    """Return every goal of which the figures were measured."""
    figures = results["figures"]
    found = []

    def figure(section: str, key: str, column: str, kind: str = "ratio") -> float | None:
        value: float | None = figures.get(section, {}).get(key, {}).get(column, {}).get(kind)
        return value

    def add(what: str, limit: float | None, measured: float | None, **options: bool) -> None:
        if limit is not None and measured is not None:
            found.append(Goal(what, limit, measured, **options))

    for framework, limit in NOTHING.items():
        library, in_flight = f"{framework}: {LIBRARY}", f"{framework}: {IN_FLIGHT}"
        add(f"no database, CPU, {framework}", limit, figure("cpu", library, "nothing"))
        for route, (plain, flying) in CPU.items():
            add(f"{route}, CPU, {framework}", plain, figure("cpu", library, route))
            what = f"{route}, BEGIN in the flight, CPU, {framework}"
            add(what, flying, figure("cpu", in_flight, route))
        read_only = f"{framework}: {READ_ONLY}"
        add(f"read-only select, CPU, {framework}", 0.62, figure("cpu", read_only, "select"))
        for column in ("slow readers", "background tasks"):
            what = f"{column}, × undisturbed, {framework}"
            add(what, 0.9, figure("disturbed", library, column), at_least=True)
        for clients in ("64", "256"):
            add(f"p99, {clients} clients, {framework}", 1.05, figure("p99", library, clients))
    library = f"FastAPI: {LIBRARY}"
    for route in ("select", "insert"):
        ratios = [figure("cpu", key, route) for key in RIVALS]
        best = min((ratio for ratio in ratios if ratio is not None), default=None)
        add(f"{route}, CPU, no more than the best rival", best, figure("cpu", library, route))
    read_only = f"FastAPI: {READ_ONLY}"
    add("read-only select, wall, 1 ms away", 0.4, figure("distance", read_only, "select"))
    for what, wanted, key, route in (
        ("insert", 3, library, "insert"),
        ("insert, pool_pre_ping", 3, f"{library}, pool_pre_ping", "insert"),
        ("insert, two settings", 3, library + SETTINGS, "insert"),
        (
            "insert, two settings, BEGIN in the flight",
            2,
            f"FastAPI: {IN_FLIGHT}{SETTINGS}",
            "insert",
        ),
        ("read-only select", 1, read_only, "select"),
    ):
        add(f"{what}, round trips", wanted, figure("trips", key, route, "value"))
    return found
