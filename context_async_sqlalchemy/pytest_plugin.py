"""Fixtures for users' tests, under pytest-asyncio or anyio's plugin.

# conftest.py
pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]

@pytest.fixture
def db_connect():
    return connect

@pytest.fixture
def app():  # for `client` and `shared_client`
    return application
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._testing.only_shared import refuse_other_connections
from context_async_sqlalchemy._unit.context import open_context
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.context import is_context_initiated
from context_async_sqlalchemy.session import db_session
from context_async_sqlalchemy.test_utils import shared_transaction

if TYPE_CHECKING:
    from httpx import AsyncClient
    from starlette.testclient import TestClient

# In strict mode, pytest-asyncio ignores an async fixture that its own decorator did not make;
# anyio's plugin accepts both.
_has_pytest_asyncio = find_spec("pytest_asyncio") is not None
_fixture: Callable[[Callable[..., Any]], Callable[..., Any]] = import_module(
    "pytest_asyncio" if _has_pytest_asyncio else "pytest"
).fixture


@pytest.fixture
def db_connect() -> DBConnect:
    """Say what to write in conftest.py, where your fixture of this name returns the database."""
    _ask_for("db_connect", "DBConnect", "connect")


@pytest.fixture
def app() -> ASGIApp:
    """Say what to write in conftest.py, where your fixture of this name returns the application."""
    _ask_for("app", "FastAPI", "application")


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


@_fixture
async def client(app: ASGIApp, shared_session: object) -> AsyncGenerator[AsyncClient]:
    """Return httpx's client, with the application in the transaction of `shared_session`.

    For an async test. The lifespan of the application does not run, and what the application raises
    is raised in the test. A fixture `client` of your own takes the place of this one.

    Args:
        app: Your fixture for the application.
        shared_session: The fixture.
    """
    try:
        from httpx import ASGITransport, AsyncClient  # may not be installed
    except ModuleNotFoundError:
        pytest.fail("The fixture 'client' needs httpx: pip install httpx", pytrace=False)
    transport = ASGITransport(app=app)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@_fixture
async def db_context(
    db_connect: DBConnect[SessionT], _open_context: object
) -> AsyncGenerator[SessionT]:
    """Open a context for a test of functions without a request; return its session.

    It is what `await db_session(connect)` returns in the test and in what the test calls, in the
    transaction of `shared_session`. What it has not committed is rolled back at the end: to see
    what a commit does, `await commit_db_session(connect)`. A request of the test has a context of
    its own.

    Args:
        db_connect: Your fixture for the database.
    """
    if not is_context_initiated():
        pytest.fail(_OUT_OF_REACH, pytrace=False)
    yield await db_session(db_connect)


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


@pytest.fixture
def no_real_database() -> Generator[None]:
    """Refuse each connection outside of a test's transaction, where a commit would stay.

    For every test, in pytest's configuration: `usefixtures = ["no_real_database"]`. It holds for
    every engine of the process, and raises SQLAlchemy's `InvalidRequestError`.
    """
    with refuse_other_connections():
        yield


@_fixture
async def _open_context(shared_session: object) -> AsyncGenerator[None]:
    context = open_context()
    try:
        yield
    finally:
        if is_context_initiated():  # or else the variable is that of another task: _OUT_OF_REACH
            await context.end()


def _ask_for(name: str, kind: str, value: str) -> NoReturn:
    pytest.fail(
        f"The fixture {name!r} is yours to define, in conftest.py:\n\n"
        f"@pytest.fixture\ndef {name}() -> {kind}:\n    return {value}",
        pytrace=False,
    )


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

_OUT_OF_REACH = (
    "The context that 'db_context' opens does not reach the test: a fixture's context variables "
    "do with pytest-asyncio 0.25 or newer, or anyio 4.0 or newer. With an older one, request "
    "'shared_session' and write 'async with new_db_session_ctx():' in the test."
)
