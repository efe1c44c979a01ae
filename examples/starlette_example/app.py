"""The application."""

from starlette.applications import Starlette

from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from examples.starlette_example.routes import routes
from examples.workflows.database import lifespan


def setup_app() -> Starlette:
    app = Starlette(routes=routes, lifespan=lifespan)
    add_starlette_http_db_session_middleware(app)
    return app


app = setup_app()
