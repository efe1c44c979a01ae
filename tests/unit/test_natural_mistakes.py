"""A natural mistake is told what to write instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

import context_async_sqlalchemy
from context_async_sqlalchemy import (
    ContextNotInitiatedError,
    DBConnect,
    db_session,
    fastapi_utils,
    new_db_session_ctx,
)
from context_async_sqlalchemy._engine.wrong_module import names_of
from context_async_sqlalchemy.test_utils import set_test_context

PACKAGE = context_async_sqlalchemy.__name__


# A block that is taken for a session


@pytest.mark.parametrize(
    "block",
    [new_db_session_ctx, set_test_context, partial(set_test_context, auto_close=True)],
    ids=["new_db_session_ctx", "set_test_context", "auto_close"],
)
async def test_what_a_block_yields_says_how_to_get_a_session(
    block: Callable[[], AbstractAsyncContextManager[None]],
) -> None:
    async with block() as session:
        with pytest.raises(AttributeError) as raised:
            session.execute  # type: ignore[attr-defined]  # noqa: B018
        assert not hasattr(session, "commit")
    assert "call 'session = await db_session(connect)'" in str(raised.value)


# A name that is imported from the wrong module


@pytest.mark.parametrize(
    ("module", "name", "places"),
    [
        ("", "add_fastapi_http_db_session_middleware", [".fastapi_utils"]),
        ("", "database_lifespan", [".fastapi_utils", ".starlette_utils"]),
        ("", "shared_transaction", [".test_utils"]),
        ("", "shared_client", [".pytest_plugin"]),
        ("", "ASGIApp", [".asgi_types"]),
        ("", "keep_on_primary", [".postgres"]),
        ("", "set_deadline", [".asgi_utils"]),
        (".fastapi_utils", "db_session", [""]),
        (".fastapi_utils", "StarletteHTTPDBSessionMiddleware", [".starlette_utils"]),
        (".starlette_utils", "add_fastapi_http_db_session_middleware", [".fastapi_utils"]),
        (".starlette_utils", "ASGIHTTPDBSessionMiddleware", [""]),
        (".asgi_utils", "IdempotencyMiddleware", [".idempotency"]),
    ],
)
def test_an_import_from_the_wrong_module_names_the_right_one(
    module: str, name: str, places: list[str]
) -> None:
    instead = " or ".join(f"'from {PACKAGE}{place} import {name}'" for place in places)
    with pytest.raises(ImportError) as raised:
        exec(f"from {PACKAGE}{module} import {name}")
    assert str(raised.value) == f"{name} is not in {PACKAGE}{module}: write {instead}"
    for place in places:
        exec(f"from {PACKAGE}{place} import {name}")


def test_a_name_that_is_nowhere_is_an_error_as_usual() -> None:
    with pytest.raises(ImportError, match="cannot import name 'get_session'"):
        exec(f"from {PACKAGE} import get_session")
    for module in (context_async_sqlalchemy, fastapi_utils):
        assert not hasattr(module, "get_session")
        assert not hasattr(module, "__wrapped__")
        with pytest.raises(
            AttributeError, match=f"'{module.__name__}' has no attribute 'db_sesion'"
        ):
            module.db_sesion  # noqa: B018


def test_a_type_checker_refuses_what_is_not_there() -> None:
    # The ignored error is what it says; an ignore without an error is one.
    with pytest.raises(ImportError):
        from context_async_sqlalchemy import database_health  # type: ignore[attr-defined]  # noqa: F401


def test_nothing_optional_is_imported_to_find_a_name() -> None:
    code = f"""
import sys
from {PACKAGE} import context
assert "ast" not in sys.modules or "inspect" in sys.modules
try:
    from {PACKAGE} import add_fastapi_http_db_session_middleware
except ImportError as error:
    print(error)
assert not {{"fastapi", "starlette", "pytest", "opentelemetry"}} & {{*sys.modules}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fastapi_utils import" in done.stdout


def test_without_sources_it_is_an_error_as_usual(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("context_async_sqlalchemy._engine.wrong_module.PACKAGE", tmp_path / "none")
    with pytest.raises(ImportError, match="cannot import name 'database_health'"):
        exec(f"from {PACKAGE} import database_health")


def test_the_names_of_a_module_are_those_that_it_has_for_others() -> None:
    doors = Path(context_async_sqlalchemy.__file__).parent
    assert names_of(doors / "fastapi_utils.py") == {*fastapi_utils.__all__}
    assert names_of(doors / "__init__.py") == {*context_async_sqlalchemy.__all__}


# A middleware that is missing


async def test_a_missing_middleware_is_named(connect: DBConnect) -> None:
    with pytest.raises(ContextNotInitiatedError) as raised:
        await db_session(connect)
    for call in (
        "add_fastapi_http_db_session_middleware(app)",
        "add_starlette_http_db_session_middleware(app)",
        "ASGIHTTPDBSessionMiddleware(app)",
        "async with new_db_session_ctx():",
    ):
        assert call in str(raised.value)
