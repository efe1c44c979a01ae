"""The page *API* has every public name, and every one has its place in "What to call"."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

import context_async_sqlalchemy
from context_async_sqlalchemy import DBConnect
from tests.helpers.public import public_names

PACKAGE = context_async_sqlalchemy.__name__
ROOT = Path(__file__).parents[2]
DOORS = sorted(file.stem for file in (ROOT / PACKAGE).glob("[!_]*.py"))
API = (ROOT / "docs" / "api.md").read_text()
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()
_, TABLE, REST = re.split(r"<!-- --8<-- \[(?:start|end):names\] -->", CONCEPTS)
CALLS, FOR_AUTHORS = TABLE.split("\n\nFor a middleware of your own:\n\n")
LINKS = re.findall(r"\[`([\w.]+)[^`\]]*`\]\(api\.md#([\w.]+)\)", TABLE)
DOCUMENTED = re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE)


def value_of(path: str) -> Any:
    """Return what is imported, or found in what is imported, by this path."""
    parts = path.removeprefix(f"{PACKAGE}.").split(".")
    if parts[0] in DOORS and len(parts) > 1:
        module: Any = importlib.import_module(f"{PACKAGE}.{parts.pop(0)}")
    else:
        module = context_async_sqlalchemy
    return reduce(getattr, parts, module)


def names_of(door: str) -> list[str]:
    """Return the names that a door has for others, also those that it only hands on."""
    module = importlib.import_module(f"{PACKAGE}.{door}")
    if (ROOT / PACKAGE / f"{door}.py").read_text().count("__all__"):
        return list(module.__all__)
    handed_on = [
        alias.name
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    types = ["ASGIApp", "Message", "Receive", "Scope", "Send"] if door == "asgi_types" else []
    return [*public_names(module), *handed_on, *types]


# The parts of the types that users see, which have no use by themselves.
PARTS = {"connect.ConnectOptions", "session.CurrentTransaction"}
PUBLIC = sorted(
    {f"{PACKAGE}.{name}" for name in context_async_sqlalchemy.__all__}
    | {f"{PACKAGE}.{door}.{name}" for door in DOORS for name in names_of(door)}
    - {f"{PACKAGE}.{part}" for part in PARTS}
)


def has(paths: list[str], path: str) -> bool:
    """Return whether one of these is the same object, under the same or another path."""
    name, value = path.rpartition(".")[2], value_of(path)
    return any(
        value_of(other) is value
        and (other.endswith(f".{name}") or name == "fastapi_http_db_session_middleware")
        for other in paths
    )


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_name_is_in_the_reference_and_in_what_to_call(path: str) -> None:
    assert has(DOCUMENTED, path)
    assert has([f"{PACKAGE}.{anchor.removeprefix(f'{PACKAGE}.')}" for _, anchor in LINKS], path)


def test_every_door_is_looked_into() -> None:
    assert len(DOORS) >= 17
    assert len(PUBLIC) > 90


@pytest.mark.parametrize("name", [name for name in vars(DBConnect) if not name.startswith("_")])
def test_what_a_connect_can_do_is_in_what_to_call(name: str) -> None:
    assert f"{PACKAGE}.DBConnect.{name}" in [anchor for _, anchor in LINKS]


@pytest.mark.parametrize(("call", "anchor"), LINKS)
def test_a_call_is_the_one_that_its_link_leads_to(call: str, anchor: str) -> None:
    in_class = re.sub(r"^connect\.", "DBConnect.", call)
    assert value_of(in_class) == value_of(anchor)
    name = in_class.rpartition(".")[2].replace("fastapi_http_db", "starlette_http_db")
    assert name == anchor.rpartition(".")[2].replace("fastapi_http_db", "starlette_http_db")


def test_every_call_of_the_table_is_a_link() -> None:
    rows = [row.split(" | ")[-1] for row in TABLE.splitlines() if row.startswith("| ")]
    spans = sum(len(re.findall(r"`[^`]+`", row)) for row in rows)
    assert len(LINKS) == spans > 70


def test_the_table_is_on_top_of_the_reference() -> None:
    assert API.index('--8<-- "docs/concepts.md:names"') < API.index("\n## ")


def test_the_reference_begins_with_the_session() -> None:
    assert DOCUMENTED[0] == f"{PACKAGE}.db_session"


def test_a_section_of_the_reference_says_from_where_to_import() -> None:
    _, *sections = re.split(r"^## ", API, flags=re.MULTILINE)
    for section in sections:
        import_ = re.search(r"^`from ([\w.]+) import …`", section, re.MULTILINE)
        assert import_ is not None, section
        for path in re.findall(r"^::: ([\w.]+)$", section, re.MULTILINE):
            assert path.rpartition(".")[0] == import_[1]


SOURCES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.py")]
IMPORTED = sorted(
    f"{found[1]}.{name}"
    for source in SOURCES
    for found in re.finditer(
        rf"^from ({PACKAGE}[\w.]*) import (\([^)]*\)|.*)", source.read_text(), re.MULTILINE
    )
    for name in re.findall(r"\w+", re.sub(r"#.*", "", found[2]))
)


def test_what_pages_and_examples_import_is_in_the_reference() -> None:
    assert {path for path in IMPORTED if not has(DOCUMENTED, path)} == set()
    assert len(set(IMPORTED)) > 40
