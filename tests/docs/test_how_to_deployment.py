"""The program of the deployment page, in processes that are forked, stopped and killed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import httpx
import psutil
import pytest
import pytest_asyncio
from sqlalchemy import text

from tests.helpers.database import Database
from tests.helpers.programs import Outside, until
from tests.helpers.servers import running_module

APP = "examples.how_to.deployment:app"
UVICORN = f"uvicorn {APP} --port {{port}} --workers 2"
GUNICORN = (
    f"gunicorn {APP} --bind 127.0.0.1:{{port}} --workers 2"
    " --worker-class uvicorn_worker.UvicornWorker"
)
PRELOADED = f"{GUNICORN} --preload"

# gunicorn runs this in the process from which it forks the workers.
USE_BEFORE_THE_FORK = """
import asyncio
from examples.how_to.deployment import connect

def on_starting(server):
    asyncio.run(connect.ping())
"""


class Service:
    """The program in several processes, and a client of it."""

    def __init__(self, client: httpx.AsyncClient, master: psutil.Process) -> None:
        self.master = master
        self._client = client
        self._numbers = itertools.count()

    def workers(self) -> list[psutil.Process]:
        return [
            child
            for child in self.master.children()
            if child.status() != psutil.STATUS_ZOMBIE
            and "resource_tracker" not in " ".join(child.cmdline())
        ]

    async def order(self) -> int:
        """Send an order; return the PID of the process that took it."""
        response = await self._client.post(f"/orders/{next(self._numbers)}")
        assert response.status_code == 201, response.text
        process: int = response.json()["process"]
        return process

    async def orders(self, count: int) -> list[int]:
        return await asyncio.gather(*(self.order() for _ in range(count)))

    async def serves(self) -> bool:
        with suppress(httpx.TransportError):
            return bool(await self.order())
        return False


Run: TypeAlias = Callable[[str], AbstractAsyncContextManager[Service]]


@pytest_asyncio.fixture
async def run(database: Database, postgresql: str, tmp_path: Path) -> AsyncGenerator[Run]:
    @asynccontextmanager
    async def run(command: str) -> AsyncGenerator[Service]:
        log, home = tmp_path / "log", str(tmp_path)  # gunicorn puts a socket into HOME
        with running_module(command, log, DATABASE_URL=postgresql, HOME=home) as port:
            # A new connection for each request, so that any of the processes may accept it.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            url = f"http://127.0.0.1:{port}"
            children = psutil.Process().children()
            (master,) = [p for p in children if str(port) in " ".join(p.cmdline())]
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:
                yield Service(client, master)
        await database.is_left_by_all()

    await database.execute('CREATE TABLE "order" (number int PRIMARY KEY)')
    yield run
    await database.execute('DROP TABLE "order"')


@asynccontextmanager
async def request_that_waits(
    service: Service, database: Database, url: str
) -> AsyncGenerator[asyncio.Task[int]]:
    """Yield a request that is in its INSERT until the block ends."""
    async with Outside(url).connection() as connection:
        await connection.execute(text('LOCK TABLE "order"'))
        request = asyncio.create_task(service.order())
        await until(lambda: database.pid_of("INSERT%"))
        yield request


@pytest.mark.parametrize("command", [UVICORN, PRELOADED])
async def test_the_processes_have_no_more_connections_than_their_pools(
    command: str, run: Run, database: Database
) -> None:
    async with run(command) as service:
        processes: set[int] = set()
        async with asyncio.timeout(30):
            while len(processes) < 2:
                processes.update(await service.orders(20))
                assert await database.connections() <= 8
        assert len(processes) == 2


async def test_a_connect_that_was_used_before_the_fork_is_that_of_each_process(
    run: Run, database: Database, tmp_path: Path
) -> None:
    config = tmp_path / "gunicorn.conf.py"
    config.write_text(USE_BEFORE_THE_FORK)
    async with run(f"{PRELOADED} --config {config}") as service:
        processes: set[int] = set()
        taken = 0
        async with asyncio.timeout(30):
            while len(processes) < 2:
                processes.update(await service.orders(20))
                taken += 20
        assert await database.fetch('SELECT count(*) FROM "order"') == [(taken,)]
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("command", [UVICORN, PRELOADED])
async def test_a_request_is_finished_when_the_server_is_stopped(
    command: str, run: Run, database: Database, postgresql: str
) -> None:
    async with run(command) as service:
        async with request_that_waits(service, database, postgresql) as request:
            service.master.terminate()
            await until(lambda: len(service.workers()) == 1)  # the idle one is gone
        assert await request
    assert await database.fetch('SELECT number FROM "order"') == [(0,)]


@pytest.mark.parametrize(
    "command", [f"{UVICORN} --timeout-graceful-shutdown 1", f"{GUNICORN} --graceful-timeout 1"]
)
async def test_a_request_that_takes_longer_than_the_server_waits_is_rolled_back(
    command: str, run: Run, database: Database, postgresql: str
) -> None:
    async with (
        run(command) as service,
        request_that_waits(service, database, postgresql) as request,
    ):
        service.master.terminate()
        with pytest.raises((AssertionError, httpx.TransportError)):
            await request
    assert await database.fetch('SELECT number FROM "order"') == []


@pytest.mark.parametrize("command", [UVICORN, GUNICORN])
async def test_a_killed_process_stores_nothing_and_is_replaced(
    command: str, run: Run, database: Database, postgresql: str
) -> None:
    async with run(command) as service:
        async with request_that_waits(service, database, postgresql) as request:
            for worker in service.workers():
                worker.kill()
            with pytest.raises(httpx.TransportError):
                await request
        await database.is_left_by_all()
        assert await database.fetch('SELECT number FROM "order"') == []
        await until(service.serves)
