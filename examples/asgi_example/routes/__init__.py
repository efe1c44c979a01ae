"""The routes: look up the workflow of a request, and answer with its result."""

import json

from context_async_sqlalchemy.asgi_types import Scope, Send
from examples.workflows.routes import ROUTES

_routes = {(route.method, route.path): route for route in ROUTES}


async def respond(scope: Scope, send: Send) -> None:
    route = _routes.get((scope["method"], scope["path"]))
    status = route.status if route is not None else 404
    body = json.dumps(await route.workflow() if route is not None else "not found").encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
