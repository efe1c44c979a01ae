"""A demonstration: requests to a real server, and what became of their transactions.

Runs on a SQLite file, or on the server of `DATABASE_URL`. Exits non-zero if a line of the table is
not as it should be.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, NullPool, event, insert, make_url, select
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
)
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)
from tests.helpers.serving import http_client


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "context_async_sqlalchemy_demo"

    name: Mapped[str] = mapped_column(primary_key=True)


def make_app(connect: DBConnect) -> FastAPI:
    app = FastAPI()
    add_fastapi_http_db_session_middleware(app)

    async def add_guest(name: str) -> None:
        session = await db_session(connect)
        await session.execute(insert(Guest).values(name=name))

    @app.exception_handler(IntegrityError)
    async def conflict(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(
            {"detail": "this guest is here already"}, status_code=409
        )

    @app.post("/guests/{name}", status_code=201)
    async def add(name: str) -> None:
        await add_guest(name)

    @app.post("/guests/{name}/without-invitation")
    async def add_without_invitation(name: str) -> None:
        await add_guest(name)
        raise HTTPException(404, "no invitation")

    @app.post("/guests/{name}/stumble")
    async def add_and_stumble(name: str) -> None:
        await add_guest(name)
        raise RuntimeError("stumbled")

    @app.post("/guests/{name}/with-friend", status_code=202)
    async def add_friend_later(name: str, background: BackgroundTasks) -> None:
        await add_guest(name)
        background.add_task(add_guest, f"{name}'s friend")

    @app.post("/guests/{name}/with-band")
    async def stream_band(name: str) -> StreamingResponse:
        async def band() -> AsyncGenerator[str]:
            for instrument in ("drums", "bass"):
                await add_guest(f"{name}'s {instrument}")
                yield f"{instrument}\n"

        await add_guest(name)
        return StreamingResponse(band())

    return app


@dataclass
class Outcome:
    """What the client saw, and what became of the transactions."""

    statuses: list[int]
    new_rows: list[str] = field(default_factory=list)
    committed: int = 0
    rolled_back: int = 0
    connections_out: int = 0

    def cells(self) -> list[str]:
        """Return its cells in the table."""
        ends = [f"{self.committed} committed"] * bool(self.committed)
        ends += [f"{self.rolled_back} rolled back"] * bool(self.rolled_back)
        statuses = ", ".join(map(str, self.statuses))
        return [
            statuses,
            ", ".join(ends),
            ", ".join(self.new_rows),
            str(self.connections_out),
        ]


# The names to request, all at the same time, and the expected outcome.
SCENARIOS = {
    "a success": (["ann"], Outcome([201], ["ann"], committed=1)),
    "a duplicate": (["ann"], Outcome([409], rolled_back=1)),
    "a 404 after a write": (
        ["bob/without-invitation"],
        Outcome([404], rolled_back=1),
    ),
    "an exception after a write": (
        ["cat/stumble"],
        Outcome([500], rolled_back=1),
    ),
    "two at the same time": (
        ["dan", "eve"],
        Outcome([201, 201], ["dan", "eve"], committed=2),
    ),
    "a background task that writes": (
        ["fay/with-friend"],
        Outcome([202], ["fay", "fay's friend"], committed=2),
    ),
    "a streamed body that writes": (
        ["gus/with-band"],
        Outcome([200], ["gus", "gus's bass", "gus's drums"], committed=2),
    ),
}


class TransactionCounter:
    """Counts how the transactions of an engine end."""

    def __init__(self) -> None:
        self.committed = self.rolled_back = 0

    def watch(self, engine: AsyncEngine) -> None:
        event.listen(engine.sync_engine, "commit", self._on_commit)
        event.listen(engine.sync_engine, "rollback", self._on_rollback)

    def _on_commit(self, _: object) -> None:
        self.committed += 1

    def _on_rollback(self, _: object) -> None:
        self.rolled_back += 1


async def run(url: URL, console: Console) -> bool:
    """Run every scenario; return whether all came out as they should."""
    counter = TransactionCounter()

    def create_engine(_: str) -> AsyncEngine:
        engine = create_async_engine(url, pool_size=5)
        counter.watch(engine)
        return engine

    connect = DBConnect(
        create_engine, async_sessionmaker, host=url.host or "a file"
    )
    table = Table(
        title=f"A FastAPI application on {url!r}", title_justify="left"
    )
    for column in (
        "",
        "request",
        "client saw",
        "transactions",
        "new rows, seen from outside",
    ):
        table.add_column(column)
    table.add_column("connections out", justify="right")

    good = 0
    known: set[str] = set()
    async with (
        observed_table(url) as read_names,
        http_client(make_app(connect), log_level="critical") as client,
    ):
        for title, (paths, expected) in SCENARIOS.items():
            counter.committed = counter.rolled_back = 0
            responses = await asyncio.gather(
                *(client.post(f"/guests/{path}") for path in paths)
            )
            await wait_for_transactions(
                counter, expected.committed + expected.rolled_back
            )
            names = await read_names()
            seen = Outcome(
                [response.status_code for response in responses],
                sorted(names - known),
                counter.committed,
                counter.rolled_back,
                connect.pool_status().checked_out,
            )
            known = names
            good += seen == expected
            table.add_row(
                "[green]✓" if seen == expected else "[red]✗",
                title,
                *seen.cells(),
            )
            if seen != expected:
                table.add_row("", "[red]should be", *expected.cells())
    await connect.close()
    console.print(table)
    console.print(
        f"{good} of {len(SCENARIOS)} requests came out as they should."
    )
    return good == len(SCENARIOS)


async def wait_for_transactions(
    counter: TransactionCounter, count: int
) -> None:
    """Wait until `count` have ended: a background task's ends after the response."""
    with suppress(TimeoutError):  # the table then shows what is missing
        async with asyncio.timeout(5):
            while counter.committed + counter.rolled_back < count:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def observed_table(
    url: URL,
) -> AsyncGenerator[Callable[[], Awaitable[set[str]]]]:
    """Make the table, and drop it at the end; yields a function that reads it from outside."""
    engine = create_async_engine(url, poolclass=NullPool)

    async def read_names() -> set[str]:
        async with engine.connect() as connection:
            return set(await connection.scalars(select(Guest.name)))

    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield read_names
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        default = f"sqlite+aiosqlite:///{Path(directory) / 'demo.db'}"
        try:
            url = make_url(os.environ.get("DATABASE_URL") or default)
            # As wide as the table: a pipe has no width.
            return 0 if asyncio.run(run(url, Console(width=128))) else 1
        except (ArgumentError, InvalidRequestError):
            return fail(
                "is not the URL of an async driver, like postgresql+asyncpg://user@host/db"
            )
        except (OSError, DBAPIError) as error:
            return fail(f"cannot be used: {type(error).__name__}")


def fail(message: str) -> int:
    print(f"DATABASE_URL {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
