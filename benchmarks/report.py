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

What a request costs with this library, with its alternatives, and without any of them. All run the
same statements in the same run. `{command}` measures this and writes `benchmarks/results.json`;
`{report}` makes this page and its plots from that file. `make bench-quick`
measures less, and prints only.

**How to read the figures.** A cell is the median of the rounds. In brackets is the median of its
ratio to the floor *in the same round*, then the middle half of the rounds. The floor is
`async with maker() as s, s.begin()`, written by hand in each handler, with the same framework. The
contenders take turns, so whatever slows the machine slows all of them: the ratios carry over to
other machines better than the absolute figures.

The plots show the same ratios. The line through the end of each bar is the middle half of the
rounds, and the dashed line is the floor.
"""


_NOTES = """\
Why some goals are not reached:

- *No database*: [a `send` and a context variable](#what-a-request-without-a-session-is-made-of) are
  part of the cost, because no middleware of this kind works without them. The rest goes into the
  container of the sessions, the request it belongs to, and closing it. What share of the request
  that is depends on the framework: a bare ASGI application takes less time itself.
- *SELECT and INSERT*: [the parts of a request](#what-a-request-is-made-of) show that the least that
  SQLAlchemy takes is already close to the goal, even without error handling. The rows below it show
  what the engine of a connect, `close()`, a context and the middleware add.
- *The best other library*, fastapi-async-sqlalchemy, settles once, at the end. This library checks
  whether there is something to commit before the response, before the end of its body, and after
  its background tasks. It refuses to commit while another task is inside a statement, or after a
  statement has failed in PostgreSQL. It also refuses any use of the session afterwards.
- *AUTOCOMMIT read*: on loopback a round trip is short, and most of the wall time is SQLAlchemy's
  CPU time, which is the same for a read in a transaction. [With a server 1 ms
  away](#wall-time-of-a-select-with-a-server-1-ms-away) this is different.
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
        "## Machine and versions\n",
        _table(
            ["", ""], [[k, str(v)] for k, v in (results["machine"] | results["versions"]).items()]
        ),
        "## Contenders\n",
        "Each contender is a small application with the same routes, the same statements and an "
        "engine with the same pool. `tests/benchmarks/test_benchmarks.py` checks that all of "
        "them send the same statements, commit the same rows and give the same answers. How they "
        "differ:\n",
        _table(["contender", "with", ""], _contenders()),
        "## Goals\n",
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
