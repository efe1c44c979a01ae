"""The core passes through PgBouncer in transaction pooling."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import URL, make_url, text

from context_async_sqlalchemy import DBConnect, same_snapshot
from tests.helpers.pgbouncer import CONNECT_ARGS, pgbouncer, pgbouncer_binary
from tests.helpers.programs import ROOT

CORE = [
    *("unit/test_auto_commit.py", "unit/test_run_in_new_context.py", "unit/test_session.py"),
    *("unit/test_atomic.py", "unit/test_after_commit.py", "unit/test_after_commit_callbacks.py"),
    *("http/test_asgi_utils.py", "http/test_asgi_contexts.py", "http/test_asgi_streaming.py"),
]


pytestmark = pytest.mark.skipif(
    pgbouncer_binary() is None, reason="pgbouncer is not installed: apt-get install pgbouncer"
)


def test_the_tests_of_the_core_pass_through_pgbouncer() -> None:
    server = make_url(os.environ["TEST_DATABASE_URL"])
    with pgbouncer(server, default_pool_size=20) as through:
        result = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov"),
                *(f"tests/{file}" for file in CORE),
            ],
            cwd=ROOT,
            env={**os.environ, "TEST_THROUGH": str(through.port)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize(
    ("driver", "arguments"), [("asyncpg", CONNECT_ARGS), ("psycopg", {"prepare_threshold": None})]
)
async def test_sessions_on_one_snapshot_are_on_it_through_pgbouncer(
    database_url: URL, driver: str, arguments: dict[str, Any]
) -> None:
    with pgbouncer(database_url, default_pool_size=4) as through:
        url = through.set(drivername=f"postgresql+{driver}")
        async with DBConnect.from_url(url, connect_args=arguments) as connect:
            for _ in range(2):
                async with same_snapshot(connect, 4) as sessions:
                    query = text("SELECT pg_current_snapshot()::text, pg_backend_pid()")
                    results = await asyncio.gather(*(s.execute(query) for s in sessions))
                    snapshots, backends = zip(*(r.one() for r in results), strict=True)
                    assert (len(set(snapshots)), len(set(backends))) == (1, 4)
