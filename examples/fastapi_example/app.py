"""The application."""

from fastapi import FastAPI

from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from examples.fastapi_example.routes import router
from examples.workflows.database import lifespan


def setup_app() -> FastAPI:
    app = FastAPI(lifespan=lifespan)
    add_fastapi_http_db_session_middleware(app)
    app.include_router(router)
    return app


app = setup_app()
