"""The application under test."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette

from examples.starlette_example.app import setup_app


@pytest.fixture
def app() -> Starlette:
    return setup_app()
