"""Notes of several tenants: each transaction begins with its settings, the tenant among them."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from fastapi import BackgroundTasks, FastAPI, HTTPException
from sqlalchemy import Connection, event, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
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
STATEMENT_TIMEOUT = "5s"
TENANTS = ("acme", "globex")

tenant: ContextVar[str] = ContextVar("tenant")


def settings_of_tenant() -> dict[str, str | int]:
    return {"app.tenant": tenant.get(), "statement_timeout": STATEMENT_TIMEOUT}


connect = DBConnect.from_url(
    DATABASE_URL, transaction_settings=settings_of_tenant
)
owner = DBConnect.from_url(DATABASE_URL)  # creates the tables, without a tenant


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "tenant_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(
        server_default=text("current_setting('app.tenant')")
    )
    body: Mapped[str]


@event.listens_for(Note.__table__, "after_create")
def enable_row_level_security(
    _: object, connection: Connection, **__: object
) -> None:
    for statement in (
        "ALTER TABLE tenant_note "
        "ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        "CREATE POLICY own ON tenant_note"
        " USING (tenant = NULLIF(current_setting('app.tenant', true), ''))",
    ):
        connection.execute(text(statement))


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


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with connect, owner:
        async with new_db_session_ctx():
            connection = await (await db_session(owner)).connection()
            await connection.run_sync(Base.metadata.create_all)
        yield


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)
app.add_middleware(TenantMiddleware)  # added last, so it runs first


async def count_notes() -> int:
    session = await db_session(connect)
    return await session.scalar(select(func.count(Note.id))) or 0


async def note_count() -> None:
    session = await db_session(connect)
    session.add(Note(body=f"there are {await count_notes()} notes"))


@app.post("/notes/{body}", status_code=201)
async def add_note(body: str, background: BackgroundTasks) -> None:
    session = await db_session(connect)
    session.add(Note(body=body))
    background.add_task(
        note_count
    )  # runs in a second transaction, for the same tenant


@app.get("/notes")
async def get_notes() -> list[str]:
    session = await db_session(connect)
    return list(await session.scalars(select(Note.body).order_by(Note.id)))


@app.post("/first/{body}", status_code=201)
async def add_first_note(body: str) -> None:
    session = await db_session(connect)
    await session.connection(
        execution_options={"isolation_level": "SERIALIZABLE"}
    )
    if await count_notes() > 0:
        raise HTTPException(409)
    session.add(Note(body=body))


@app.get("/report")
async def report() -> str:
    session = await db_session(connect)
    await session.connection(
        execution_options={
            "isolation_level": "REPEATABLE READ",
            "postgresql_readonly": True,
        }
    )
    await session.execute(text("SET LOCAL statement_timeout = '60s'"))
    return f"{await count_notes()} notes"
