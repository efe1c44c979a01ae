"""Many mixed requests to one server, which must not leak, and must store what it has confirmed.

Run it with `python -m tests.soak`; it starts its own PostgreSQL server. It exits non-zero if
something has grown, or if rows are missing or unwanted.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, NullPool, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tests.helpers.models import Base, Item
from tests.helpers.postgres import postgres_server
from tests.helpers.servers import running_server

REQUESTS = 20_000
WARM_UP = 1_000
CONCURRENCY = 32
TIME_LIMIT = 600  # seconds
MEMORY_GROWTH = 1.1

IN_TRANSACTION = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND state <> 'idle' AND backend_type = 'client backend'"
)

# How a request ends, with the status of its response. The client of an endless body hangs up.
ENDINGS = {
    "": 201,
    "/refused": 404,
    "/raised": 500,
    "/endless": 200,
    "/streamed": 200,
    "/background": 202,
}
# The rows it writes after the response has started, besides the one before.
WRITTEN_LATER = {"/streamed": ["1", "2"], "/background": ["later"]}


@dataclass
class Told:
    """What the clients were told.

    Attributes:
        committed: The rows of successes.
        refused: The rows of failures.
        wrong: Requests with an unexpected response.
    """

    committed: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Figures:
    """What an idle server holds."""

    file_descriptors: int
    sockets: int
    tasks: int
    connections_out: int
    in_transaction: int
    resident_memory: int

    def differ(self, later: Figures) -> list[str]:
        """Return the figures that differ in `later`; memory may grow a little."""
        before, after = asdict(self), asdict(later)
        grown = after.pop("resident_memory") > before.pop("resident_memory") * MEMORY_GROWTH
        return [name for name in before if before[name] != after[name]] + [
            "resident_memory"
        ] * grown


class Soak:
    """One server, its database, and what its clients were told."""

    def __init__(self, port: int, engine: AsyncEngine) -> None:
        self.port = port
        self.engine = engine
        self.told = Told()
        self._numbers = itertools.count()

    async def send(self, endings: Iterable[str]) -> None:
        """Send a request for each of `endings`, `CONCURRENCY` at a time."""
        remaining = iter(endings)

        async def work() -> None:
            for ending in remaining:
                await self._request(client, f"n{next(self._numbers)}", ending)

        async with self._client() as client, asyncio.TaskGroup() as clients:
            for _ in range(CONCURRENCY):
                clients.create_task(work())

    async def idle_figures(self) -> Figures:
        """Return the figures of the server as soon as it is idle, or after ten seconds."""
        # When a hang-up cancels a statement, the pool loses the connection, and makes another when
        # it needs one. Once it has needed all of them, its size at rest is the maximum.
        await self.send([""] * CONCURRENCY * 4)
        deadline = time.monotonic() + 10
        async with self._client() as client, self.engine.connect() as observer:
            while True:
                figures, is_idle = await self._figures(client, observer)
                if is_idle or time.monotonic() > deadline:
                    return figures
                await asyncio.sleep(0.05)

    async def names(self) -> set[str]:
        """Return the names of all rows."""
        async with self.engine.connect() as connection:
            return set(await connection.scalars(select(Item.name)))

    def _client(self) -> httpx.AsyncClient:
        # uvicorn closes a connection that is idle for five seconds: avoid a race by being first.
        limits = httpx.Limits(keepalive_expiry=1)
        url = f"http://127.0.0.1:{self.port}"
        return httpx.AsyncClient(base_url=url, limits=limits, timeout=30)

    async def _request(self, client: httpx.AsyncClient, name: str, ending: str) -> None:
        # uvicorn closes the connection when an application has raised, even after a whole response:
        # the next request on it might get none.
        headers = {"Connection": "close"} if ending == "/raised" else None
        async with client.stream("POST", f"/{name}{ending}", headers=headers) as response:
            if ending == "/endless":
                parts = response.aiter_text()
                await anext(parts)
            else:
                await response.aread()
        if response.status_code != ENDINGS[ending]:
            self.told.wrong.append(f"{name}{ending}: {response.status_code}")
        rows = [name, *(f"{name} {suffix}" for suffix in WRITTEN_LATER.get(ending, []))]
        if response.is_success:
            self.told.committed.update(rows)
        else:
            self.told.refused.update(rows)

    async def _figures(
        self, client: httpx.AsyncClient, observer: AsyncConnection
    ) -> tuple[Figures, bool]:
        stats = (await client.get("/stats")).json()
        server = psutil.Process(stats["pid"])
        sockets = server.net_connections("tcp")
        figures = Figures(
            file_descriptors=server.num_fds(),
            sockets=len(sockets),
            tasks=stats["tasks"],
            connections_out=stats["connections_out"],
            in_transaction=await observer.scalar(IN_TRANSACTION) or 0,
            resident_memory=server.memory_info().rss,
        )
        ours = [s for s in sockets if s.laddr.port == self.port and s.status != psutil.CONN_LISTEN]
        return figures, len(ours) == 1 and not (figures.connections_out or figures.in_transaction)


async def soak(url: URL, log: Path, console: Console) -> bool:
    """Send all requests; return whether nothing leaked, and no row is missing or unwanted."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    endings = itertools.cycle(ENDINGS)
    started = time.monotonic()
    with running_server("uvicorn with httptools", url, log) as port:
        async with asyncio.timeout(TIME_LIMIT):
            run = Soak(port, engine)
            await run.send(itertools.islice(endings, WARM_UP))
            before = await run.idle_figures()
            await run.send(itertools.islice(endings, REQUESTS - WARM_UP))
            after = await run.idle_figures()
            names = await run.names()
    seconds = time.monotonic() - started

    console.print(table_of(before, after))
    missing, unwanted = run.told.committed - names, run.told.refused & names
    console.print(
        f"{REQUESTS} requests in {seconds:.0f} s, {len(run.told.wrong)} answered wrongly; "
        f"{len(names)} rows, {len(missing)} missing, {len(unwanted)} of refused requests."
    )
    for title, found in (
        ("wrong", run.told.wrong),
        ("missing", missing),
        ("unwanted", unwanted),
    ):
        if found:
            console.print(f"[red]{title}: {sorted(found)[:10]}")
    return not (before.differ(after) or run.told.wrong or missing or unwanted)


def table_of(before: Figures, after: Figures) -> Table:
    """Return a table of what an idle server held before and after."""
    table = Table(title="An idle server holds", title_justify="left")
    table.add_column("")
    table.add_column(f"after {WARM_UP}", justify="right")
    table.add_column(f"after {REQUESTS}", justify="right")
    differing = before.differ(after)
    for name, value in asdict(before).items():
        later = asdict(after)[name]
        shown = [
            f"{v / 2**20:.1f} MiB" if name == "resident_memory" else str(v) for v in (value, later)
        ]
        style = "red" if name in differing else None
        table.add_row(name.replace("_", " "), *shown, style=style)
    return table


def main() -> int:
    with postgres_server() as url, tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        return 0 if asyncio.run(soak(make_url(url), log, Console())) else 1


if __name__ == "__main__":
    sys.exit(main())
