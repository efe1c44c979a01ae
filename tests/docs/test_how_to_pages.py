"""A how-to asks its question, shows the code, and keeps open what everybody meets."""

import re
from pathlib import Path

import pytest

from tests.helpers.programs import ROOT

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
FOLDED = re.compile(r"^\?\?\? .*\n(?:\n| {4}.*\n)*", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def open_text(page: Path) -> str:
    """Return what a reader sees of a page before they unfold anything."""
    return FOLDED.sub("", page.read_text())


@each_page
def test_its_first_line_is_the_question_that_it_answers(page: Path) -> None:
    title, question, *_ = page.read_text().split("\n\n")
    assert title.startswith("# ")
    assert question.endswith("?")


@each_page
def test_the_code_comes_before_it_is_explained(page: Path) -> None:
    assert "```python" in page.read_text().partition("\n## What it does\n")[0]


@each_page
def test_three_points_to_watch_for_stay_open(page: Path) -> None:
    _, _, rest = open_text(page).partition("\n## What to watch for\n")
    watched, *_ = rest.split("\n## ")
    assert len(re.findall(r"^- ", watched, re.MULTILINE)) <= 3


@each_page
def test_a_reader_is_stopped_at_most_once(page: Path) -> None:
    assert page.read_text().count("\n!!! ") <= 1


def test_what_is_folded_is_no_code_that_the_examples_would_not_have() -> None:
    # A fence in a fold is indented: no test would compare it with its program.
    assert [
        page.stem for page in PAGES if re.search(r"^ +```", page.read_text(), re.MULTILINE)
    ] == []
