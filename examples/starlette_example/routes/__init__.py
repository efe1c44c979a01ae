"""The routes: each endpoint answers with the result of its workflow."""

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.workflows.routes import ROUTES, WorkflowRoute


def make_route(route: WorkflowRoute) -> Route:
    async def endpoint(_: Request) -> JSONResponse:
        return JSONResponse(await route.workflow(), route.status)

    return Route(route.path, endpoint, methods=[route.method])


routes = [make_route(route) for route in ROUTES]
