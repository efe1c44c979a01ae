"""What is measured: the sections of the results, each with its unit and floor."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.contenders import FLOOR


class Section(NamedTuple):
    """One kind of figures.

    Attributes:
        name: Its name in the results.
        title: The heading of its table.
        unit: The unit of its values.
        text: What it shows, in Markdown.
        plot: The columns of its plot, of the ratios with FastAPI. Default: it has none.
        floor_column: The column with which a contender's other columns are compared. Default None:
            each is compared with the same column of the floor.
    """

    name: str
    title: str
    unit: str
    text: str
    plot: tuple[str, ...] = ()
    floor_column: str | None = None

    def floor_of(self, key: str, column: str) -> tuple[str, str]:
        """Return the contender and column that a figure is compared with."""
        if self.floor_column is not None:
            return key, self.floor_column
        return f"{key.partition(':')[0]}: {FLOOR}", column


_ROUTES = (
    "*nothing* asks for no session; *select* and *insert* send one statement; *five* sends five in "
    "three child coroutines; *change* loads an object, changes it and flushes."
)

SECTIONS = [
    Section(
        "cpu",
        "CPU time of a request",
        "µs",
        f"In process, without a server, one request after the other. {_ROUTES} The CPU time is "
        "that of the Python process, without PostgreSQL's.",
        plot=("select", "insert"),
    ),
    Section(
        "layers",
        "What a request is made of",
        "µs",
        "CPU time of the same requests, from raw asyncpg to this library, adding one layer at a "
        "time. The least that SQLAlchemy takes is `maker()`, the statement and `commit()`, without "
        "error handling. The next rows add the engine of a connect, which watches commits and "
        "connections for problems that PostgreSQL and the drivers do not report; `close()`; "
        "`new_db_session_ctx()`, which settles; and, instead of that, the middleware. The most "
        "that anyone could save is the difference between the least and the floor.",
    ),
    Section(
        "empty",
        "What a request without a session is made of",
        "µs",
        "CPU time of a request that asks for no session: with a middleware that only passes on "
        "each message with its own `send`; with one that also sets and resets a context variable; "
        "and with this library, which needs both, and a container for sessions.",
    ),
    Section(
        "distance",
        "Wall time of a request with a server 1 ms away",
        "µs",
        "Each round trip goes through a proxy that delays it by 1 ms, as a network would. On "
        "loopback, CPU time hides what it is worth to save round trips.",
    ),
    Section(
        "trips",
        "Round trips of a request",
        "",
        "Counted by a proxy between the application and PostgreSQL, on a hot connection.",
    ),
    Section(
        "throughput",
        "Requests a second",
        "/s",
        "Served by uvicorn (asyncio, httptools) in one process, with a pool of 10 connections; "
        "each request is one INSERT. The columns are numbers of concurrent clients. Server, client "
        "and PostgreSQL share the cores.",
        plot=("1", "64", "256"),
    ),
    Section("p50", "Median latency", "ms", "Of the same requests."),
    Section(
        "p99",
        "99th percentile of the latency",
        "ms",
        "Of the same requests.",
        plot=("1", "64", "256"),
    ),
    Section(
        "disturbed",
        "Quick requests while others are slow",
        "/s",
        "Served by uvicorn with a pool of 5 connections. 4 clients send requests with one SELECT "
        "each, first while 50 clients slowly read a body of 4 MiB that is streamed after a SELECT, "
        "then while 50 background tasks of such requests sleep. The ratio compares each contender "
        "with itself undisturbed. By hand, the handler gives its connection back before the body "
        "starts; a contender that keeps it until the end has no connection left.",
        plot=("slow readers", "background tasks"),
        floor_column="undisturbed",
    ),
    Section(
        "uvloop",
        "On uvloop",
        "µs",
        "CPU time of the same requests, on asyncio's own loop and on uvloop. The floor is by hand, "
        "on asyncio's own.",
    ),
    Section(
        "memory",
        "Memory of a request in flight",
        "KiB",
        "What Python allocates for each of 500 requests that have their session and wait, "
        "including the task of the request.",
    ),
    Section(
        "start",
        "Start-up time",
        "ms",
        "From the start of the process until uvicorn listens, imports included. fastapi-sqla "
        "connects to the database during the start, the others at the first request.",
    ),
]
