"""PgBouncer in front of a server, in transaction pooling mode."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from tests.helpers.postgres import free_port, wait_until

# For an engine with asyncpg, which prepares a statement on one connection of PgBouncer and may look
# for it on another. PgBouncer 1.21 and newer need none of it, asyncpg 0.31 needs only the first.
CONNECT_ARGS: dict[str, Any] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}


def pgbouncer_binary() -> str | None:
    """Return the path of PgBouncer, or None if it is not installed."""
    # Debian installs it in a directory that only root has in PATH.
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")


@contextmanager
def pgbouncer(server: URL, **settings: object) -> Generator[URL]:
    """Run PgBouncer on a free loopback port.

    It accepts every client, and connects to all databases with the user and password of `server`.

    Args:
        server: The server behind it.
        settings: Further settings, such as `default_pool_size=3`.

    Yields:
        The URL of `server` through PgBouncer.

    Raises:
        AssertionError: If it is not installed, or does not start.
    """
    binary = pgbouncer_binary()
    assert binary is not None, "pgbouncer is not installed"
    port = free_port()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
    } | settings
    if os.geteuid() == 0:  # PgBouncer refuses to run as root
        settings["user"] = "nobody"
    target = {
        "host": server.host,
        "port": server.port,
        "user": server.username,
        "password": server.password,
    }
    config = "\n".join(
        [
            "[databases]",
            "* = " + " ".join(f"{k}={_quoted(v)}" for k, v in target.items() if v is not None),
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
    )
    with tempfile.TemporaryDirectory(prefix="context-async-sqlalchemy-") as directory:
        ini, log = Path(directory) / "pgbouncer.ini", Path(directory) / "log"
        ini.write_text(config)
        with log.open("wb") as output:
            process = subprocess.Popen([binary, str(ini)], stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: process.poll() is not None or accepts(port))
            assert process.poll() is None, log.read_text()
            yield server.set(host="127.0.0.1", port=port, username="anybody", password=None)
        finally:
            # It has nothing to lose, and on SIGTERM some versions wait for their clients.
            process.kill()
            process.wait()


def _quoted(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def accepts(port: int) -> bool:
    """Return whether something listens on a loopback port."""
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
