"""Notes of several tenants, each with a database of its own."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import make_url, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from context_async_sqlalchemy.fastapi_utils import (
    add_database_exception_handlers,
    add_fastapi_http_db_session_middleware,
)

DATABASE_URL = make_url(os.environ.get("DATABASE_URL", "sqlite:///notes"))
TENANTS = ("acme", "globex", "initech")


@dataclass
class Opened:
    connect: DBConnect
    users: int = 0


class Tenants:
    """A connect for each tenant in use, and for those that were used last."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._opened: dict[str, Opened] = {}  # what was used last comes last

    @asynccontextmanager
    async def use(self, name: str) -> AsyncGenerator[DBConnect]:
        opened = self._opened.pop(name, None) or Opened(make_connect(name))
        self._opened[name] = opened
        opened.users += 1
        try:
            yield opened.connect
        finally:
            opened.users -= 1
            await self.close_unused(self.limit)

    async def close_unused(self, limit: int) -> None:
        while len(self._opened) > limit:
            unused = [
                name
                for name, opened in self._opened.items()
                if not opened.users
            ]
            if not unused:
                return
            await self._opened.pop(unused[0]).connect.close()


def make_connect(name: str) -> DBConnect:
    url = DATABASE_URL.set(database=f"{DATABASE_URL.database}_{name}")
    return DBConnect.from_url(url, pool_size=2, max_overflow=3)


tenants = Tenants(limit=100)
tenant: ContextVar[DBConnect] = ContextVar("tenant")


class TenantMiddleware:
    """Set the connect of the tenant in the header `X-Tenant`, which a gateway has checked."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = Headers(scope=scope).get("x-tenant", "")
        if name not in TENANTS:
            await PlainTextResponse("no such tenant", 404)(scope, receive, send)
            return
        async with tenants.use(name) as connect:
            tenant.set(connect)
            await self.app(scope, receive, send)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    for name in TENANTS:
        try:
            await create_tables(name)
        except Exception:  # of one tenant, who alone is without a database
            logging.exception("The database of %s is not ready", name)
    yield
    await tenants.close_unused(0)


async def create_tables(name: str) -> None:
    async with tenants.use(name) as connect, new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.create_all)


app = FastAPI(lifespan=lifespan)
add_database_exception_handlers(app)
add_fastapi_http_db_session_middleware(app)
app.add_middleware(TenantMiddleware)  # added last, so it runs first


async def tenant_session() -> AsyncSession:
    return await db_session(tenant.get())


Session = Annotated[AsyncSession, Depends(tenant_session)]


async def index(body: str) -> None:
    session = await tenant_session()
    session.add(Note(body=f"{body} is indexed"))


@app.post("/notes/{body}", status_code=201)
async def add_note(
    body: str, session: Session, background: BackgroundTasks
) -> None:
    session.add(Note(body=body))
    background.add_task(index, body)


@app.get("/notes")
async def get_notes(session: Session) -> list[str]:
    return list(await session.scalars(select(Note.body).order_by(Note.id)))
