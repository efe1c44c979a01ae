"""Two admin panels, made at import time, on the engine of the application."""

import os
import secrets

import sqladmin
from fastapi import FastAPI
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette_admin.contrib import sqla as starlette_admin

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///books.db")
)


class Base(DeclarativeBase):
    pass


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


@app.get("/titles")
async def titles() -> list[str]:
    session = await db_session(connect)
    return list(await session.scalars(select(Book.title).order_by(Book.id)))


# sqladmin


class BookAdmin(sqladmin.ModelView, model=Book):
    column_list = (Book.id, Book.title)


admin = sqladmin.Admin(
    app, session_maker=connect.lazy_session_maker(), base_url="/admin"
)
admin.add_view(BookAdmin)

# starlette-admin

panel = starlette_admin.Admin(
    connect.lazy_session_maker(),
    base_url="/panel",
    route_name="panel",
    secret_key=os.environ.get("SECRET_KEY", secrets.token_hex()),
)
panel.add_view(starlette_admin.ModelView(Book))
panel.mount_to(app)
