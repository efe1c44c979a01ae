"""The results as tables, and the goals."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.contenders import AUTOCOMMIT, CONTENDERS, LIBRARY
from benchmarks.sections import SECTIONS, Section

FRAMEWORKS = ("ASGI", "Starlette", "FastAPI")
OTHERS = [contender.key for contender in CONTENDERS if contender.package]


class Goal(NamedTuple):
    """A figure and its goal."""

    what: str
    limit: float
    measured: float
    at_least: bool = False

    @property
    def is_reached(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def columns_of(section: Section, results: Any) -> list[str]:
    rows = results["figures"][section.name].values()
    return list(dict.fromkeys(column for figures in rows for column in figures))


def rows_of(section: Section, results: Any) -> list[list[str]]:
    """Return the rows of a section: the contender, then a cell for each column."""
    columns = columns_of(section, results)
    return [
        [key, *(_cell(figures.get(column), section.unit) for column in columns)]
        for key, figures in results["figures"][section.name].items()
    ]


def terminal_tables(results: Any) -> list[Table]:
    """Return a table for each section."""
    tables = []
    for section in SECTIONS:
        table = Table(title=section.title, title_justify="left")
        table.add_column("")
        for column in columns_of(section, results):
            table.add_column(column, justify="right")
        for row in rows_of(section, results):
            table.add_row(*row, style="bold" if LIBRARY in row[0] else None)
        tables.append(table)
    return tables


def reach_table(results: Any) -> Table:
    """Return a table of the goals."""
    table = Table(title="Reach", title_justify="left")
    for column in ("", "goal", "measured", "reached"):
        table.add_column(column)
    for goal in goals(results):
        style = None if goal.is_reached else "red"
        table.add_row(*goal_cells(goal), style=style)
    return table


def goal_cells(goal: Goal) -> list[str]:
    sign = "≥" if goal.at_least else "≤"
    reached = "yes" if goal.is_reached else "no"
    return [goal.what, f"{sign} {goal.limit:g}", f"{goal.measured:g}", reached]


def goals(results: Any) -> list[Goal]:
    """Return every goal with what was measured."""
    figures = results["figures"]

    def ratio(section: str, framework: str, column: str, suffix: str = "") -> float:
        value: float = figures[section][f"{framework}: {LIBRARY}{suffix}"][column]["ratio"]
        return value

    found = []
    for framework in FRAMEWORKS:
        found.append(
            Goal(
                f"no database, CPU: × the bare app ({framework})",
                1.2,
                ratio("cpu", framework, "nothing"),
            )
        )
        found += [
            Goal(f"{name}, CPU: × by hand ({framework})", 0.9, ratio("cpu", framework, route))
            for name, route in (("SELECT", "select"), ("INSERT", "insert"))
        ]
        found.append(
            Goal(
                f"AUTOCOMMIT read, wall: × by hand ({framework})",
                0.55,
                ratio("wall", framework, "select", AUTOCOMMIT),
            )
        )
        found += [
            Goal(
                f"{column}: × undisturbed ({framework})",
                0.9,
                ratio("disturbed", framework, column),
                at_least=True,
            )
            for column in ("slow readers", "background tasks")
        ]
    for route in ("select", "insert"):
        best = min(figures["cpu"][key][route]["ratio"] for key in OTHERS)
        found.append(
            Goal(
                f"{route.upper()}, CPU: × by hand, no more than the best other library",
                best,
                ratio("cpu", "FastAPI", route),
            )
        )
    trips = figures["trips"]
    library = f"FastAPI: {LIBRARY}"
    found += [
        Goal("INSERT, round trips", 3, trips[library]["insert"]["value"]),
        Goal(
            "pre-ping on a hot connection, extra round trips",
            0,
            trips[f"{library}, pool_pre_ping"]["insert"]["value"]
            - trips[library]["insert"]["value"],
        ),
        Goal("AUTOCOMMIT read, round trips", 1, trips[library + AUTOCOMMIT]["select"]["value"]),
    ]
    return found


def _cell(figure: Any, unit: str) -> str:
    if figure is None:
        return ""
    value = f"{figure['value']:,.4g}" if figure["value"] < 1000 else f"{figure['value']:,.0f}"
    absolute = f"{value} {unit}".strip()
    if "ratio" not in figure or "low" not in figure:
        return absolute
    if figure["ratio"] == figure["low"] == figure["high"]:
        return f"{absolute} ({figure['ratio']:.2f})"
    return f"{absolute} ({figure['ratio']:.2f}; {figure['low']:.2f} to {figure['high']:.2f})"
