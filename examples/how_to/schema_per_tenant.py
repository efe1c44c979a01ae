"""Notes of several tenants, each with a schema of its own in one database."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from fastapi import BackgroundTasks, FastAPI
from sqlalchemy import Connection, event, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    SessionTransaction,
    mapped_column,
)
from sqlalchemy.schema import CreateSchema
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
)

DATABASE_URL = os.environ.get(
    "DATABASE_URL", "postgresql://app@127.0.0.1/postgres"
)
TENANTS = ("acme", "globex")

tenant: ContextVar[str] = ContextVar("tenant")


class TenantSession(Session):
    """A session that finds its tables in the schema of its tenant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.info["schema"] = tenant.get()


@event.listens_for(TenantSession, "after_begin")
def use_schema(
    session: Session, _: SessionTransaction, connection: Connection
) -> None:
    connection.execution_options(
        schema_translate_map={None: session.info["schema"]}
    )


connect = DBConnect.from_url(
    DATABASE_URL, session_options={"sync_session_class": TenantSession}
)
owner = DBConnect.from_url(
    DATABASE_URL
)  # creates the schemas, without a tenant


class TenantMiddleware:
    """Set the tenant from `X-Tenant`, which a gateway has checked."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["type"] == "http":
            name = Headers(scope=scope).get("x-tenant")
            if name not in TENANTS:
                await PlainTextResponse("no such tenant", 404)(
                    scope, receive, send
                )
                return
            tenant.set(name)
        await self.app(scope, receive, send)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with connect, owner:
        async with new_db_session_ctx():
            connection = await (await db_session(owner)).connection()
            for name in TENANTS:
                await connection.execute(CreateSchema(name, if_not_exists=True))
                await connection.execution_options(
                    schema_translate_map={None: name}
                )
                await connection.run_sync(Base.metadata.create_all)
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)
app.add_middleware(TenantMiddleware)  # added last, so it runs first


async def index(body: str) -> None:
    session = await db_session(connect)
    session.add(Note(body=f"{body} is indexed"))


@app.post("/notes/{body}", status_code=201)
async def add_note(body: str, background: BackgroundTasks) -> None:
    session = await db_session(connect)
    session.add(Note(body=body))
    background.add_task(index, body)


@app.get("/notes")
async def get_notes() -> list[str]:
    session = await db_session(connect)
    return list(await session.scalars(select(Note.body).order_by(Note.id)))
