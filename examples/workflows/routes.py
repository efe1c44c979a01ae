"""Which workflow answers which request, in every framework."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple, get_args

from context_async_sqlalchemy.session import CurrentTransaction
from examples.workflows import workflows


class WorkflowRoute(NamedTuple):
    """A path, and the workflow that answers it, as JSON."""

    method: str
    path: str
    workflow: Callable[[], Awaitable[Any]]
    status: int = 200


def _in_mode(mode: CurrentTransaction, block: str) -> WorkflowRoute:
    workflow = partial(workflows.atomic_after_open_transaction, mode, block == "failing")
    return WorkflowRoute("POST", f"/atomic_after_open_transaction/{mode}/{block}", workflow)


ROUTES = [
    WorkflowRoute("GET", "/notes", workflows.notes),
    WorkflowRoute("POST", "/simple_usage", workflows.simple_usage),
    WorkflowRoute("POST", "/atomic", workflows.atomic),
    *(_in_mode(mode, "passing") for mode in get_args(CurrentTransaction)),
    *(_in_mode(mode, "failing") for mode in get_args(CurrentTransaction)),
    WorkflowRoute("POST", "/early_commit", workflows.early_commit),
    WorkflowRoute("POST", "/early_rollback", workflows.early_rollback),
    WorkflowRoute("POST", "/early_close", workflows.early_close),
    WorkflowRoute("POST", "/concurrent_queries", workflows.concurrent_queries),
    WorkflowRoute("POST", "/sessions_outside_the_context", workflows.sessions_outside_the_context),
    WorkflowRoute("POST", "/rollback_by_exception", workflows.rollback_by_exception),
    WorkflowRoute("POST", "/rollback_by_status_code", workflows.rollback_by_status_code, 409),
]
