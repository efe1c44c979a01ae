"""What an application answers while its database is down or full, or after a lost race."""

import os

from fastapi import FastAPI
from sqlalchemy import text

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_database_exception_handlers,
    add_fastapi_http_db_session_middleware,
    database_health,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///counter.db")
connect = DBConnect.from_url(
    DATABASE_URL, os.environ.get("DATABASE_PASSWORD"), pool_timeout=3
)

app = FastAPI(lifespan=database_lifespan(connect, wait=True))
add_fastapi_http_db_session_middleware(app, attempts=3)
add_database_exception_handlers(app)
app.add_api_route("/health", database_health(connect, timeout=2))


@app.get("/answer")
async def answer() -> int:
    session = await db_session(connect)
    return int((await session.execute(text("SELECT 42"))).scalar_one())
