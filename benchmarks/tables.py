"""The results as tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.contenders import LIBRARY
from benchmarks.goals import goals
from benchmarks.sections import SECTIONS, Section


def measured(results: Any) -> list[Section]:
    """Return the sections of which there are figures."""
    return [section for section in SECTIONS if section.name in results["figures"]]


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
    for section in measured(results):
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
    table = Table(title="Goals (× by hand, if nothing else is said)", title_justify="left")
    for column in ("", "goal", "measured"):
        table.add_column(column)
    for goal in goals(results):
        sign = "≥" if goal.at_least else "≤"
        style = None if goal.is_reached else "red"
        table.add_row(goal.what, f"{sign} {goal.limit:g}", f"{goal.measured:g}", style=style)
    return table


def short_cell(figure: Any, unit: str) -> str:
    """Return a figure as text, with its ratio to the floor."""
    if figure is None:
        return ""
    value = f"{figure['value']:,.4g}" if figure["value"] < 1000 else f"{figure['value']:,.0f}"
    absolute = f"{value} {unit}".strip()
    return f"{absolute} ({figure['ratio']:.2f})" if "ratio" in figure else absolute


def _cell(figure: Any, unit: str) -> str:
    cell = short_cell(figure, unit)
    if not cell.endswith(")") or figure["ratio"] == figure["low"] == figure["high"]:
        return cell
    return f"{cell[:-1]}; {figure['low']:.2f} to {figure['high']:.2f})"
