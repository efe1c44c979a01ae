"""Write `docs/benchmarks.md` and its plots from `results.json`: `python -m benchmarks.report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, FLOOR
from benchmarks.plot import bar_chart
from benchmarks.sections import SECTIONS, Section
from benchmarks.tables import columns_of, goal_cells, goals, rows_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
COMMAND = "python -m benchmarks.report"

_INTRODUCTION = """\
# Benchmarks

What a request costs with this library, with its alternatives, and without any, for the same
statements in the same run. `{command}` measured it and wrote `benchmarks/results.json`;
`{report}` made this page and its plots of that. `make bench-quick` measures less, and
prints only.

**How to read the figures.** A cell is the median of the rounds, and in brackets the median of its
ratio to the floor *in the same round*, with the middle half of the rounds. The floor is
`async with maker() as s, s.begin()` written by hand in each handler, with the same framework. The
contenders take turns, so that what slows the machine down slows all of them down: the ratios hold
on other machines rather than the absolute figures.

The ratios are also in the plots, with the middle half of the rounds as a line through the end of
each bar, and the floor dashed.
"""


_NOTES = """\
What is not reached, and why:

- *No database*: [a `send` and a context variable](#what-a-request-without-a-session-is-made-of),
  without which there is no middleware of this kind, are a part of it; the rest is the container of
  the sessions, whose request it is, and its end. What share of the request that is depends on the
  framework: an ASGI application that does nothing but answer takes less itself.
- *SELECT and INSERT*: by [what a request is made of](#what-a-request-is-made-of), the least that
  SQLAlchemy takes is near the goal already, without anything for the case that something fails. The
  rows below it say what the engine of a connect, `close()`, a context and the middleware add.
- *The best other library*, fastapi-async-sqlalchemy, settles once, at the end. This one asks before
  the response, before the end of its body and after its background tasks whether there is
  something to commit; refuses to commit while another task is inside a statement, or after one has
  failed in PostgreSQL; and refuses what comes later.
- *AUTOCOMMIT read*: on loopback a round trip is short, and SQLAlchemy's CPU time, which is the same
  for a read in a transaction, is most of the wall time. [With a server 1 ms
  away](#wall-time-of-a-select-with-a-server-1-ms-away) it is not.
"""


def render(results: Any) -> dict[str, str]:
    """Return the content of each file, by its path from the root of the repository."""
    files = {
        _plot_of(section): bar_chart(
            f"{section.title}: × {section.floor_column or FLOOR}", _with_fastapi(section, results)
        )
        for section in SECTIONS
        if section.plot
    }
    parts = [
        _INTRODUCTION.format(command=results["command"], report=COMMAND),
        "## Taken on\n",
        _table(
            ["", ""], [[k, str(v)] for k, v in (results["machine"] | results["versions"]).items()]
        ),
        "## Contenders\n",
        "Each is a small application with the same routes, the same statements and an engine with "
        "the same pool; `tests/test_benchmarks.py` checks that they send the same statements, "
        "commit the same rows and give the same answers. How they differ:\n",
        _table(["contender", "with", ""], _contenders()),
        "## What was to be reached\n",
        _table(["", "goal", "measured", "reached"], [goal_cells(goal) for goal in goals(results)]),
        _NOTES,
    ]
    for section in SECTIONS:
        parts += [f"## {section.title}\n", f"{section.text}\n"]
        if section.plot:
            path = _plot_of(section).removeprefix("docs/")
            parts += [f"![{section.title}, FastAPI]({path})\n", f"Made by `{COMMAND}`.\n"]
        heads = ["", *columns_of(section, results)]
        parts.append(_table(heads, rows_of(section, results)))
    return {"docs/benchmarks.md": "\n".join(parts), **files}


def _contenders() -> list[list[str]]:
    with_frameworks: dict[tuple[str, str], list[str]] = {}
    for contender in CONTENDERS:
        key = contender.name, contender.differs
        with_frameworks.setdefault(key, []).append(contender.framework)
    return [[name, ", ".join(f), differs] for (name, differs), f in with_frameworks.items()]


def _plot_of(section: Section) -> str:
    return f"docs/benchmarks/{section.name}.svg"


def _with_fastapi(section: Section, results: Any) -> dict[str, Any]:
    rows = results["figures"][section.name].items()
    return {key.removeprefix("FastAPI: "): f for key, f in rows if key.startswith("FastAPI")}


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    (ROOT / "docs" / "benchmarks").mkdir(exist_ok=True)
    for path, content in render(json.loads(RESULTS.read_text())).items():
        (ROOT / path).write_text(content)


if __name__ == "__main__":
    main()
