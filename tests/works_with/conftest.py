"""Fixtures of the tests with other packages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client

Serve = Callable[[str], AbstractAsyncContextManager[Any]]


@pytest.fixture
def serve_program(postgresql: str, database: Database, load: Callable[[str, str], Any]) -> Serve:
    """Return a way to serve a program of the page; at the end, every connection is home."""

    @asynccontextmanager
    async def serve_program(name: str) -> AsyncGenerator[Any]:
        program = load(name, postgresql)
        program.outside = Outside(postgresql)
        async with http_client(program.app, log_level="critical") as program.client:
            yield program
            await until(lambda: connections_out(program.connect) == 0)
            await database.is_quiet()

    return serve_program
