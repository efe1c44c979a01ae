"""Real ASGI servers that serve `tests.helpers.served_app`, each in its own process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from sqlalchemy import URL

from tests.helpers.postgres import free_port

SERVERS = {
    "uvicorn with h11": "uvicorn --http h11 --no-access-log --port {port}",
    "uvicorn with httptools": "uvicorn --http httptools --no-access-log --port {port}",
    "hypercorn": "hypercorn --workers 0 --bind 127.0.0.1:{port}",
    "granian": "granian --interface asgi --port {port}",
}

# How Python, asyncio and SQLAlchemy complain about something that was forgotten.
_FORGOTTEN = ("never awaited", "never retrieved", "but it is pending", "non-checked-in connection")


@contextmanager
def running_server(name: str, database_url: URL, log: Path) -> Generator[int]:
    """Run one of `SERVERS`; yields its port.

    Args:
        name: Its name there.
        database_url: The database of the application.
        log: The file for what the server prints.

    Raises:
        AssertionError: If it does not start, does not exit, or leaves something behind.
    """
    url = database_url.render_as_string(hide_password=False)
    command = f"{SERVERS[name]} tests.helpers.served_app:app"
    with running_module(command, log, SERVED_DATABASE_URL=url) as port:
        yield port


@contextmanager
def running_module(
    command: str, log: Path, *, port: int | None = None, **environment: str
) -> Generator[int]:
    """Run a module that serves; yields its port.

    Args:
        command: What follows `python -m`, with `{port}` in it.
        log: The file for what it prints.
        port: The port. Default None: a free one.
        **environment: Its environment variables.

    Raises:
        AssertionError: If it does not start, does not exit, or leaves something behind.
    """
    port = port or free_port()
    with log.open("wb") as output:
        process = psutil.Popen(
            [sys.executable, "-m", *command.format(port=port).split()],
            cwd=Path(__file__).parents[2],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(port, process, log)
        yield port
    finally:
        alive = _end(process)
    assert not alive, f"{command} did not exit"
    forgotten = [
        line for line in log.read_text().splitlines() if any(f in line for f in _FORGOTTEN)
    ]
    assert not forgotten


def _wait_for(port: int, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def _end(process: psutil.Popen) -> list[psutil.Process]:
    """Terminate a server and its workers; return those that had to be killed."""
    processes = [process]
    with suppress(psutil.NoSuchProcess):
        processes += process.children(recursive=True)
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for survivor in alive:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(alive, timeout=5)
    return list(alive)
