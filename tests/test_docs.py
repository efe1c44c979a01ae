"""What the documentation says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RELIABILITY = (TESTS.parent / "docs" / "reliability.md").read_text()
CHECKS = re.findall(r"^- `(\w+\.py)`: \*(.+)\*$", RELIABILITY, re.MULTILINE)


def test_every_promise_names_its_tests() -> None:
    assert len(CHECKS) == RELIABILITY.count(".py`: *")
    assert len(CHECKS) > 20


@pytest.mark.parametrize(("file", "sentence"), CHECKS)
def test_the_tests_that_are_named_exist(file: str, sentence: str) -> None:
    name = f"test_{sentence.replace(' ', '_')}("
    assert f"def {name}" in (TESTS / file).read_text()
