import pytest
import quickstart
from starlette.testclient import TestClient

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy.asgi_types import ASGIApp

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]


@pytest.fixture
def db_connect() -> DBConnect:
    return quickstart.connect


@pytest.fixture
def app() -> ASGIApp:
    return quickstart.app


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    with TestClient(quickstart.app):  # its lifespan creates them
        pass
