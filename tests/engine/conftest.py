"""Fixtures of the tests of engines."""

from __future__ import annotations

import pytest

from tests.helpers.mocks import Creators


@pytest.fixture
def creators() -> Creators:
    return Creators()
