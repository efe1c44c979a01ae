"""The routes: each workflow is an endpoint as it is."""

from fastapi import APIRouter

from examples.workflows.routes import ROUTES

router = APIRouter()

for route in ROUTES:
    router.add_api_route(
        route.path,
        route.workflow,
        methods=[route.method],
        status_code=route.status,
        name=route.path.strip("/"),
    )
