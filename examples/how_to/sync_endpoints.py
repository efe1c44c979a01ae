"""A FastAPI application whose endpoints are plain functions."""

import os
from typing import Annotated

from anyio import from_thread
from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import ForeignKey, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
)

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///library.db")
connect = DBConnect.from_url(DATABASE_URL, os.environ.get("DATABASE_PASSWORD"))

app = FastAPI(lifespan=database_lifespan(connect))
add_fastapi_http_db_session_middleware(app)
InjectedSession = Annotated[AsyncSession, Depends(DBSessionDependency(connect))]


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelf"

    name: Mapped[str] = mapped_column(primary_key=True)
    books: Mapped[list["Book"]] = relationship()


class Book(Base):
    __tablename__ = "book"

    title: Mapped[str] = mapped_column(primary_key=True)
    shelf: Mapped[str] = mapped_column(ForeignKey("shelf.name"))


async def create_tables() -> None:
    session = await db_session(connect)
    await (await session.connection()).run_sync(Base.metadata.create_all)


@app.put("/shelves")
def put_shelves() -> None:
    from_thread.run(create_tables)


async def count_books() -> int:
    session = await db_session(connect)
    return await session.scalar(select(func.count()).select_from(Book)) or 0


@app.get("/books", response_model=None)
def get_books() -> int:
    return from_thread.run(count_books)


def add_book(session: Session, shelf: str, title: str) -> list[str]:
    """Put a book on a shelf and return its titles: the ORM without an await."""
    found = session.get(Shelf, shelf) or Shelf(name=shelf)
    session.add(found)
    found.books.append(Book(title=title))
    return [book.title for book in found.books]


@app.post("/shelves/{shelf}/{title}", status_code=201, response_model=None)
def post_book(shelf: str, title: str, session: InjectedSession) -> list[str]:
    return from_thread.run(session.run_sync, add_book, shelf, title)


async def order_book(shelf: str, title: str) -> None:
    session = await db_session(connect)
    await session.run_sync(add_book, shelf, title)


def order_later(shelf: str, title: str) -> None:
    from_thread.run(order_book, shelf, title)


@app.post("/orders/{shelf}/{title}", status_code=202, response_model=None)
def post_order(shelf: str, title: str, background: BackgroundTasks) -> None:
    background.add_task(order_later, shelf, title)
