"""Write the pages on benchmarks and their plots from `results.json`: `python -m benchmarks.report`.

A file with a part of the results makes a part of the pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.contenders import (
    AUTOCOMMIT,
    CONTENDERS,
    FLOOR,
    IN_FLIGHT,
    LEAST,
    LIBRARY,
    LIMIT,
    READ_ONLY,
    SETTINGS,
)
from benchmarks.goals import RIVALS
from benchmarks.plot import bar_chart
from benchmarks.sections import SECTIONS, Section
from benchmarks.tables import columns_of, measured, rows_of, short_cell

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
COMMAND = "python -m benchmarks.report"
HAND, OURS = f"FastAPI: {FLOOR}", f"FastAPI: {LIBRARY}"

QUESTIONS = {  # a row of the page: its section and column
    "CPU time, no database": ("cpu", "nothing"),
    "CPU time, one SELECT": ("cpu", "select"),
    "CPU time, one INSERT": ("cpu", "insert"),
    "CPU time, five statements": ("cpu", "five"),
    "CPU time, an object loaded, changed, flushed": ("cpu", "change"),
    "Wall time, one SELECT, server 1 ms away": ("distance", "select"),
    "Wall time, one INSERT, server 1 ms away": ("distance", "insert"),
    "Round trips, one SELECT": ("trips", "select"),
    "Round trips, one INSERT": ("trips", "insert"),
    "99th percentile of the latency, 64 clients": ("p99", "64"),
    "99th percentile of the latency, 256 clients": ("p99", "256"),
    "Memory of a request in flight": ("memory", "in flight"),
    "Start-up time": ("start", "until it listens"),
}
ANSWERS = {  # a column of the page
    "by hand": HAND,
    "this library": OURS,
    "read-only": f"FastAPI: {READ_ONLY}",
    "BEGIN in the flight": f"FastAPI: {IN_FLIGHT}",
}

OPTIONS = [
    c
    for c in CONTENDERS
    if c.name.startswith(f"{LIBRARY}, ") and c.name not in (READ_ONLY, IN_FLIGHT)
]
OPTION_COSTS = {  # a column of the second table: its section and column
    "CPU time, SELECT": ("cpu", "select"),
    "CPU time, INSERT": ("cpu", "insert"),
    "INSERT, server 1 ms away": ("distance", "insert"),
    "round trips, INSERT": ("trips", "insert"),
}

_PAGE = """\
# Benchmarks

{plot}{lead}

## What it costs and saves

In brackets is the ratio to *by hand*. The last column has the other libraries and FastAPI's own
`Depends`.

{table}
{legend}{options}[Tables](benchmarks/tables.md) has the other frameworks, and how figures spread.

## How it is measured

- All run the same statements with the same engine and pool, in turns, in one run: what slows the
  machine slows all of them, so the ratios carry over to other machines better than the absolute
  figures. A ratio is the median of the ratios within a round.
- A test checks that every contender sends the same statements, commits the same rows and gives the
  same answers. Some promise less: see [Contenders](benchmarks/tables.md#contenders).
- `make bench` measures this and writes `benchmarks/results.json`; `{report}` makes
  these pages from that file. These figures: `{command}`, {where}.
"""

_PLOT = """\
![{title}: × by hand]({path})

A bar is the CPU time of one request with FastAPI: the shorter, the better. The dashed line is the
same request *by hand*, `async with maker() as s, s.begin()` in each handler; the thin line at the
end of a bar is the middle half of the rounds.

"""

_OPTIONS = """\
With an option, a request takes, again with the ratio to *by hand*, which has none of this:

"""

_TABLES = """\
# Tables

Every figure behind [Benchmarks](../benchmarks.md). A cell is the median of the rounds. In brackets
is the median of its ratio to the floor *in the same round*, then the middle half of the rounds. The
floor is `async with maker() as s, s.begin()`, with the same framework. In a plot, the line through
the end of a bar is the middle half of the rounds, and the dashed line is the floor.
"""

_CONTENDERS = """\
Each is a small application with the same routes, the same statements and an engine with the same
pool. How they differ:
"""

_LEGENDS = {
    READ_ONLY: "*Read-only* is `read_only_methods` of the middleware.\n\n",
    IN_FLIGHT: "*BEGIN in the flight* is `begin_with_first_statement` of `from_url`.\n\n",
}


def render(results: Any) -> dict[str, str]:
    """Return the content of each file, by its path from the root of the repository."""
    files = {
        f"docs/{_plot_of(section)}": bar_chart(
            f"{section.title}: × {section.floor_column or FLOOR}",
            _plotted(section, results),
            section.plot,
        )
        for section in measured(results)
        if section.plot
    }
    cpu = SECTIONS[0]
    versions = results["versions"]
    packages = ("Python", "SQLAlchemy", "asyncpg", "fastapi")
    page = _PAGE.format(
        lead=_lead(results),
        plot=_PLOT.format(title=cpu.title, path=_plot_of(cpu)) if cpu in measured(results) else "",
        table=_questions(results),
        legend="".join(
            text for name, text in _LEGENDS.items() if _has(results, f"FastAPI: {name}")
        ),
        options=_options(results),
        report=COMMAND,
        command=results["command"],
        where=", ".join(f"{name} {versions[name]}" for name in packages),
    )
    parts = [
        _TABLES,
        "## Machine and versions\n",
        _table(["", ""], [[k, str(v)] for k, v in (results["machine"] | versions).items()]),
        "## Contenders\n",
        _CONTENDERS,
        _table(["contender", "with", ""], _contenders(results)),
    ]
    for section in measured(results):
        parts += [f"## {section.title}\n", f"{section.text}\n"]
        if section.plot and section is not cpu:
            name = _plot_of(section).removeprefix("benchmarks/")
            parts.append(f"![{section.title}, FastAPI]({name})\n")
        parts.append(_table(["", *columns_of(section, results)], rows_of(section, results)))
    return {"docs/benchmarks.md": page, "docs/benchmarks/tables.md": "\n".join(parts), **files}


def _lead(results: Any) -> str:
    def ratio(key: str, column: str) -> str:
        figure = _figure(results, "cpu", key, column)
        return f"{figure['ratio']:.2f} ×" if figure is not None else "(not measured)"

    lead = (
        f"A request with one INSERT takes **{ratio(OURS, 'insert')}** the CPU time of the same "
        f"request written by hand, one with a SELECT {ratio(OURS, 'select')}"
    )
    if _has(results, f"FastAPI: {READ_ONLY}"):
        lead += f", and a read-only one {ratio(f'FastAPI: {READ_ONLY}', 'select')}"
    if rivals := _range(results, "cpu", "insert"):
        lead += f"; with other libraries an INSERT takes {rivals} ×"
    return lead + "."


def _questions(results: Any) -> str:
    keys = {name: key for name, key in ANSWERS.items() if _has(results, key)}
    units = {section.name: section.unit for section in SECTIONS}
    rows = []
    for question, (section, column) in QUESTIONS.items():
        figures = [_figure(results, section, key, column) for key in keys.values()]
        cells = [
            short_cell(figure, units[section]).replace(" (1.00)", "") for figure in figures[:1]
        ]
        cells += [short_cell(figure, units[section]) for figure in figures[1:]]
        if any(cells):
            rows.append([question, *cells, _range(results, section, column)])
    return _table(["", *keys, "others"], rows)


def _options(results: Any) -> str:
    units = {section.name: section.unit for section in SECTIONS}
    rows = []
    for name, key in [("none", OURS), *((c.name, c.key) for c in OPTIONS if _has(results, c.key))]:
        cells = [
            short_cell(_figure(results, section, key, column), units[section])
            for section, column in OPTION_COSTS.values()
        ]
        rows.append([name.removeprefix(f"{LIBRARY}, "), *cells])
    return f"{_OPTIONS}{_table(['', *OPTION_COSTS], rows)}\n" if len(rows) > 1 else ""


def _range(results: Any, section: str, column: str) -> str:
    figures = [_figure(results, section, key, column) for key in RIVALS]
    ratios = [figure["ratio"] for figure in figures if figure is not None and "ratio" in figure]
    return " to ".join(dict.fromkeys(f"{end(ratios):.2f}" for end in (min, max) if ratios))


def _figure(results: Any, section: str, key: str, column: str) -> Any:
    return results["figures"].get(section, {}).get(key, {}).get(column)


def _has(results: Any, key: str) -> bool:
    return any(key in rows for rows in results["figures"].values())


def _contenders(results: Any) -> list[list[str]]:
    with_frameworks: dict[tuple[str, str], list[str]] = {}
    for contender in CONTENDERS:
        key = contender.name, contender.differs
        if _has(results, contender.key):
            with_frameworks.setdefault(key, []).append(contender.framework)
    return [[name, ", ".join(f), differs] for (name, differs), f in with_frameworks.items()]


def _plot_of(section: Section) -> str:
    return f"benchmarks/{section.name}.svg"


def _plotted(section: Section, results: Any) -> dict[str, Any]:
    return {
        key.removeprefix("FastAPI: "): figures
        for key, figures in results["figures"][section.name].items()
        if key.startswith("FastAPI")
        and not key.endswith((LEAST, LIMIT, SETTINGS, AUTOCOMMIT))
        and key not in (option.key for option in OPTIONS)
    }


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    (ROOT / "docs" / "benchmarks").mkdir(exist_ok=True)
    for path, content in render(json.loads(RESULTS.read_text())).items():
        (ROOT / path).write_text(content)


if __name__ == "__main__":
    main()
