"""The application under test."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

from examples.fastapi_example.app import setup_app


@pytest.fixture
def app() -> FastAPI:
    return setup_app()
