"""What the library touches of others is what the page on reliability lists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text().partition("## What this library touches")[2]
TREES = [ast.parse(file.read_text()) for file in (ROOT / "context_async_sqlalchemy").rglob("*.py")]
NODES = [node for tree in TREES for node in ast.walk(tree)]


def own_names() -> Iterator[str]:
    """Yield what the package itself defines, and sets on `self` and on what it has made."""
    for node in NODES:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def private_names() -> Iterator[str]:
    """Yield the private names that are read or set, also with `getattr`."""
    for node in NODES:
        match node:
            case ast.Attribute(attr=name):
                yield name
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                yield name


def listeners() -> Iterator[str]:
    """Yield the events that are listened to by name."""
    for node in NODES:
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="event"), attr="listen"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                yield name


FOREIGN = {n for n in private_names() if n[:1] == "_" and n[:2] != "__"} - {*own_names()}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_a_private_name_of_others_is_listed(name: str) -> None:
    assert f"{name}`" in PAGE


@pytest.mark.parametrize("name", sorted(set(listeners())))
def test_a_listener_is_listed(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_what_is_replaced_is_listed() -> None:
    replaced = {
        ast.unparse(target)
        for node in NODES
        if isinstance(node, ast.Assign)
        for assigned in node.targets
        for target in ast.walk(assigned)
        if isinstance(target, ast.Attribute)
    }
    for node in NODES:
        match node:
            case ast.Call(
                func=ast.Name(id="replace_of_dialect"), args=[_, ast.Constant(value=str(name)), _]
            ):
                replaced.add(f"dialect.{name}")
    for name in ("do_commit", "do_close", "get_bind", "__call__", "dbapi_connection"):
        assert any(target.endswith(f".{name}") for target in replaced)
        assert f"{name}`" in PAGE
    assert len(FOREIGN) >= 6
