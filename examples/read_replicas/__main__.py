"""Serve the notes of `examples/how_to/replicas.py` on a primary and a replica.

Starts both servers and stops them at the end, unless PRIMARY_URL and REPLICA_URL name running ones.
A replica has the users and databases of its primary, so only the host and port of its URL are used.
Arguments are passed to uvicorn, such as `--port 8001`.
"""

import os
import secrets
import signal
import sys
from contextlib import ExitStack

import uvicorn
from sqlalchemy import make_url

from tests.helpers.cluster import primary_and_standby


def main() -> None:
    # uvicorn re-raises the signal that stopped it; a bare SIGTERM would leave the servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with ExitStack() as stack:
        if "PRIMARY_URL" in os.environ:
            urls = [os.environ["PRIMARY_URL"], os.environ["REPLICA_URL"]]
        else:
            servers = stack.enter_context(primary_and_standby())
            urls = [server.url.replace("+asyncpg", "") for server in servers]
            for name, server, url in zip(
                ("primary", "replica"), servers, urls, strict=True
            ):
                print(f"{name}: {url} in {server.data}", file=sys.stderr)
        hosts = [
            f"{url.host}:{url.port or 5432}" for url in map(make_url, urls)
        ]
        os.environ.setdefault(
            "COOKIE_SECRET", secrets.token_hex()
        )  # of all workers, with --workers
        os.environ.update(DATABASE_URL=urls[0], DATABASE_HOSTS=",".join(hosts))
        uvicorn.main(["examples.how_to.replicas:app", *sys.argv[1:]])


if __name__ == "__main__":
    main()
