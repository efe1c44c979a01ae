"""A request that the application makes of itself, with a copy of the scope, is one of its own."""

from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy.asgi_types import Scope


def is_same_request(context: DBSessionContext, scope: Scope, layer: object) -> bool:
    """Return whether a scope that has a context, and comes to a layer, is that of its request.

    Not in a batch: a copy of the scope, with another path, comes to a layer that it has passed. A
    mount may copy it, too, but leads to other layers.
    """
    if layer in context.passed:
        return id(scope) == context.scope_id
    context.passed.append(layer)
    return True
