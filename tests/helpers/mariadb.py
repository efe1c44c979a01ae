"""A real MariaDB server, if Debian's `mariadb-server` is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL

from tests.helpers.pgbouncer import accepts
from tests.helpers.postgres import free_port, wait_until


def mariadb_binary() -> str | None:
    """Return the path of the server, or None if it is not installed."""
    # Debian installs it in a directory that only root has in PATH.
    return shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")


@contextmanager
def mariadb() -> Generator[URL]:
    """Run an empty server in a temporary directory; yields the URL of its database `test`.

    Raises:
        AssertionError: If it is not installed, or does not start.
    """
    binary = mariadb_binary()
    assert binary is not None, "mariadbd is not installed"
    user = ["--user=root"] if os.geteuid() == 0 else []  # otherwise it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="context-async-sqlalchemy-") as directory:
        data, port = Path(directory) / "data", free_port()
        subprocess.run(
            [
                *("mariadb-install-db", "--no-defaults", f"--datadir={data}", *user),
                "--auth-root-authentication-method=normal",
            ],
            check=True,
            capture_output=True,
            # Two of them at a time would find each other's temporary tables.
            env=os.environ | {"TMPDIR": directory},
        )
        log = Path(directory) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(binary, "--no-defaults", f"--datadir={data}", *user, f"--port={port}"),
                    *("--bind-address=127.0.0.1", f"--socket={directory}/socket"),
                    *("--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0"),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(lambda: process.poll() is not None or accepts(port))
            assert process.poll() is None, log.read_text()
            yield URL.create("mariadb", "root", host="127.0.0.1", port=port, database="test")
        finally:
            process.kill()  # it has nothing to lose
            process.wait()
