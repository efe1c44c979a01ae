"""Fixtures for users' tests, under pytest-asyncio or anyio's plugin.

# conftest.py
pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]

@pytest.fixture
def db_connect():
    return connect

@pytest.fixture
def app():  # for `shared_client`
    return application
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.test_utils import shared_transaction

if TYPE_CHECKING:
    from starlette.testclient import TestClient

# In strict mode, pytest-asyncio ignores an async fixture that its own decorator did not make;
# anyio's plugin accepts both.
_has_pytest_asyncio = find_spec("pytest_asyncio") is not None
_fixture: Callable[[Callable[..., Any]], Callable[..., Any]] = import_module(
    "pytest_asyncio" if _has_pytest_asyncio else "pytest"
).fixture


@_fixture
async def shared_session(db_connect: DBConnect[SessionT]) -> AsyncGenerator[SessionT]:
    """Return a session for a test, in a `shared_transaction` with the application.

    For an async test whose client calls the application on the test's event loop, as httpx does
    with its `ASGITransport`.

    Args:
        db_connect: Your fixture for the database.
    """
    await _close_with_loop(db_connect)
    async with shared_transaction(db_connect) as session:
        yield session


@pytest.fixture
def shared_client(app: ASGIApp, db_connect: DBConnect) -> Generator[TestClient]:
    """Return Starlette's `TestClient`, with the application in a `shared_transaction`.

    For a sync test. The transaction is opened on the client's event loop, and includes the startup
    and shutdown of the application.

    Args:
        app: Your fixture for the application.
        db_connect: Your fixture for the database.
    """
    from starlette.testclient import TestClient  # may not be installed

    async def in_transaction(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        async with db_connect, shared_transaction(db_connect):
            await app(scope, receive, send)

    with TestClient(in_transaction) as client:
        yield client


async def _close_with_loop(connect: DBConnect[Any]) -> None:
    # A test often has its own event loop, and no fixture knows when it ends. But before a loop
    # closes, it closes the asynchronous generators that are left.
    closing = _closing.setdefault(asyncio.get_running_loop(), {})
    if connect not in closing:
        closing[connect] = _close_in_the_end(connect)
        await anext(closing[connect])


async def _close_in_the_end(connect: DBConnect[Any]) -> AsyncGenerator[None]:
    try:
        async with connect:
            yield
    finally:
        _closing.pop(asyncio.get_running_loop(), None)


# The generators that close connects at the end of each loop.
_closing: dict[asyncio.AbstractEventLoop, dict[DBConnect[Any], AsyncGenerator[None]]] = {}
