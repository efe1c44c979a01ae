"""The examples in the docstrings, which the reference of the API shows, run."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import textwrap
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import MetaData, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.routing import Route

import context_async_sqlalchemy
from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    fastapi_utils,
    idempotency,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    observability,
    postgres,
    pytest_plugin,
    replicas,
    starlette_utils,
    test_utils,
)
from tests.helpers.public import public_names

MODULES = [
    context_async_sqlalchemy,
    *(fastapi_utils, starlette_utils, idempotency, observability, postgres, pytest_plugin),
    *(replicas, test_utils),
]
SECTIONS = re.compile(r"^(?:Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE)
EXAMPLE = re.compile(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", re.MULTILINE)


def examples() -> dict[str, str]:
    """Return the code in each public docstring, by the name of its owner."""
    found = {}
    for module in MODULES:
        for name in public_names(module):
            value = getattr(module, name)
            owners = {name: value}
            if inspect.isclass(value):
                methods = [key for key in vars(value) if not key.startswith("_")]
                owners |= {f"{name}.{key}": getattr(value, key) for key in methods}
            for owner, documented in owners.items():
                text = SECTIONS.split(inspect.getdoc(documented) or "")[0]
                if code := EXAMPLE.findall(text + "\n"):
                    found[owner] = textwrap.dedent("".join(code))
    return found


EXAMPLES = examples()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Member(Base):
    __tablename__ = "member"

    name: Mapped[str] = mapped_column(primary_key=True)


async def names_of(connect: DBConnect) -> dict[str, Any]:
    """Return what the examples take for granted."""
    app = FastAPI()
    fastapi_utils.add_fastapi_http_db_session_middleware(app)

    @app.post("/members/{name}")
    async def add_member(name: str) -> None:
        (await db_session(connect)).add(Member(name=name))

    async def load(limit: int = 0) -> None:
        await (await db_session(connect)).get(User, limit)

    async def send(_: object) -> None: ...

    return {name: getattr(module, name) for module in MODULES for name in public_names(module)} | {
        **{"Annotated": Annotated, "AsyncSession": AsyncSession, "Depends": Depends},
        **{"Route": Route, "Starlette": Starlette, "asyncio": asyncio, "partial": partial},
        **{"Member": Member, "User": User, "select": select},
        "user": SimpleNamespace(email="ann@example.com"),
        **{"connect": connect, "connection": connect, "password": "secret", "app": app},
        **{"keys": idempotency.idempotency_table(MetaData()), "user_of": str},
        **{"primary": connect, "replica": connect, "database": connect, "SECRET": "x" * 16},
        **{"load_orders": load, "load_users": load, "load_report": load, "send_welcome_mail": send},
        "client": httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test"),
    }


@asynccontextmanager
async def tables(connect: DBConnect) -> AsyncGenerator[None]:
    async def run(change: Callable[..., None]) -> None:
        async with new_non_ctx_atomic_session(connect) as session:
            await (await session.connection()).run_sync(change)

    await run(Base.metadata.create_all)
    yield
    await run(Base.metadata.drop_all)


@pytest.fixture
def example_url(owner: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Return the URL of a database that the example is for."""
    if owner == "same_snapshot":
        return str(request.getfixturevalue("postgresql"))
    return f"sqlite:///{tmp_path / 'docstrings.db'}"


@pytest.mark.parametrize("owner", EXAMPLES)
async def test_an_example_in_a_docstring_runs(owner: str, example_url: str) -> None:
    async with DBConnect.from_url(example_url) as connect, tables(connect):
        names = await names_of(connect)
        async with AsyncExitStack() as stack:
            if owner in ("atomic_db_session", "on_commit", "on_primary"):
                await stack.enter_async_context(new_db_session_ctx())
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            result = eval(compile(EXAMPLES[owner], owner, "exec", flags), names)
            if result is not None:
                await result
        await names["client"].aclose()


def test_the_examples_are_found() -> None:
    assert len(EXAMPLES) >= 12
    assert "DBConnect.from_url" in EXAMPLES
