"""The functions and classes of 2.1.9 are where they were, and take the same parameters."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

from context_async_sqlalchemy import ContextAlreadyInitiatedError, ContextNotInitiatedError

REQUIRED = inspect.Parameter.empty

# The functions and classes of 2.1.9, by module, with their parameters and defaults.
SURFACE: dict[str, dict[str, dict[str, Any]]] = {
    "context_async_sqlalchemy": {
        "ASGIHTTPDBSessionMiddleware": {"app": REQUIRED, "before_commit": None},
        "DBConnect": {
            "engine_creator": REQUIRED,
            "session_maker_creator": REQUIRED,
            "host": None,
            "before_create_session_handler": None,
        },
        "DBConnect.change_host": {"self": REQUIRED, "host": REQUIRED},
        "DBConnect.close": {"self": REQUIRED},
        "DBConnect.connect": {"self": REQUIRED, "host": REQUIRED},
        "DBConnect.create_session": {"self": REQUIRED},
        "DBConnect.session_maker": {"self": REQUIRED},
        "atomic_db_session": {"connect": REQUIRED, "current_transaction": "commit"},
        "auto_commit_by_status_code": {"status_code": REQUIRED, "before_commit": None},
        "close_all_sessions": {},
        "close_db_session": {"connect": REQUIRED},
        "commit_all_sessions": {"before_commit": None},
        "commit_db_session": {"connect": REQUIRED},
        "db_session": {"connect": REQUIRED},
        "get_db_session_from_context": {"connect": REQUIRED},
        "init_db_session_ctx": {"force": False},
        "is_context_initiated": {},
        "new_non_ctx_atomic_session": {"connect": REQUIRED},
        "new_non_ctx_session": {"connect": REQUIRED},
        "pop_db_session_from_context": {"connect": REQUIRED},
        "reset_db_session_ctx": {"token": REQUIRED, "with_close": True},
        "rollback_all_sessions": {},
        "rollback_db_session": {"connect": REQUIRED},
        "run_in_new_ctx": {"callable_func": REQUIRED, "args": REQUIRED, "kwargs": REQUIRED},
    },
    "context_async_sqlalchemy.asgi_utils": {
        "ASGIHTTPDBSessionMiddleware": {"app": REQUIRED, "before_commit": None},
    },
    "context_async_sqlalchemy.auto_commit": {
        "auto_commit_by_status_code": {"status_code": REQUIRED, "before_commit": None},
        "close_all_sessions": {},
        "commit_all_sessions": {"before_commit": None},
        "rollback_all_sessions": {},
    },
    "context_async_sqlalchemy.connect": {
        "DBConnect": {
            "engine_creator": REQUIRED,
            "session_maker_creator": REQUIRED,
            "host": None,
            "before_create_session_handler": None,
        },
    },
    "context_async_sqlalchemy.context": {
        "get_db_session_from_context": {"connect": REQUIRED},
        "init_db_session_ctx": {"force": False},
        "is_context_initiated": {},
        "pop_db_session_from_context": {"connect": REQUIRED},
        "reset_db_session_ctx": {"token": REQUIRED, "with_close": True},
    },
    "context_async_sqlalchemy.run_in_new_context": {
        "run_in_new_ctx": {"callable_func": REQUIRED, "args": REQUIRED, "kwargs": REQUIRED},
    },
    "context_async_sqlalchemy.session": {
        "atomic_db_session": {"connect": REQUIRED, "current_transaction": "commit"},
        "close_db_session": {"connect": REQUIRED},
        "commit_db_session": {"connect": REQUIRED},
        "db_session": {"connect": REQUIRED},
        "new_non_ctx_atomic_session": {"connect": REQUIRED},
        "new_non_ctx_session": {"connect": REQUIRED},
        "rollback_db_session": {"connect": REQUIRED},
    },
    "context_async_sqlalchemy.fastapi_utils": {
        "add_fastapi_http_db_session_middleware": {"app": REQUIRED, "before_commit": None},
        "fastapi_http_db_session_middleware": {
            "request": REQUIRED,
            "call_next": REQUIRED,
            "before_commit": None,
        },
    },
    "context_async_sqlalchemy.starlette_utils": {
        "add_starlette_http_db_session_middleware": {"app": REQUIRED, "before_commit": None},
        "starlette_http_db_session_middleware": {
            "request": REQUIRED,
            "call_next": REQUIRED,
            "before_commit": None,
        },
    },
    "context_async_sqlalchemy.test_utils": {
        "put_savepoint_session_in_ctx": {"connection": REQUIRED, "session": REQUIRED},
        "rollback_session": {"connection": REQUIRED},
        "set_test_context": {"auto_close": False},
    },
}
FUNCTIONS = [(module, name) for module, names in SURFACE.items() for name in names]


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_function_of_2x_takes_the_same_parameters(module: str, name: str) -> None:
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    parameters = list(inspect.signature(function).parameters.values())
    expected = SURFACE[module][name]
    assert {p.name: p.default for p in parameters[: len(expected)]} == expected
    added = parameters[len(expected) :]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    assert all(p.default is not REQUIRED or p.kind in variable for p in added)


@pytest.mark.parametrize("module", ["context_async_sqlalchemy", "context_async_sqlalchemy.context"])
def test_the_errors_of_2x_are_where_they_were(module: str) -> None:
    for error in (ContextAlreadyInitiatedError, ContextNotInitiatedError):
        assert getattr(importlib.import_module(module), error.__name__) is error
