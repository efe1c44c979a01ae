"""The application under test."""

from __future__ import annotations

import pytest

from context_async_sqlalchemy.asgi_types import ASGIApp
from examples.asgi_example.app import setup_app


@pytest.fixture
def app() -> ASGIApp:
    return setup_app()
