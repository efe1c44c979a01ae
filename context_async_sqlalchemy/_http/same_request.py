"""Whether a request that comes to a layer has a context already."""

from context_async_sqlalchemy._http.send import SCOPE_KEY
from context_async_sqlalchemy._unit.context import _context
from context_async_sqlalchemy.asgi_types import Scope


def has_context(scope: Scope, layer: object = None) -> bool:
    """Return whether a request that comes to a layer takes part in a context that is open already.

    It does if an outer layer opened it for the same request, or a test did. A context that is
    merely inherited is another client's.
    """
    if SCOPE_KEY not in scope or (context := scope[SCOPE_KEY]).closed:
        here = _context.get()
        return here is not None and here.is_test and not here.closed
    if layer is None:
        return True
    # In a batch, a copy of the scope, with another path, comes to a layer that it has passed. A
    # mount may copy it, too, but leads to other layers.
    if layer in context.passed:
        return scope is context.scope
    context.passed += (layer,)
    return True


def application_around(scope: Scope) -> object:
    """Return the application in which the context of a request was opened, not a mounted one."""
    return scope[SCOPE_KEY].app if SCOPE_KEY in scope else scope.get("app")
