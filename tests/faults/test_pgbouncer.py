"""The core passes through PgBouncer in transaction pooling."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sqlalchemy import make_url

from tests.helpers.pgbouncer import pgbouncer, pgbouncer_binary
from tests.helpers.programs import ROOT

CORE = [
    *("unit/test_auto_commit.py", "unit/test_run_in_new_context.py", "unit/test_session.py"),
    *("unit/test_atomic.py", "unit/test_after_commit.py", "unit/test_after_commit_callbacks.py"),
    *("http/test_asgi_utils.py", "http/test_asgi_contexts.py", "http/test_asgi_streaming.py"),
]


@pytest.mark.skipif(
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
