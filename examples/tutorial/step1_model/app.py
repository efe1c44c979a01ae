"""A library that knows its books."""

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

connect = DBConnect.from_url(
    os.environ.get("DATABASE_URL", "sqlite:///library.db")
)


class Base(DeclarativeBase):
    pass


class Book(Base):
    __tablename__ = "book"

    isbn: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]


class BookData(BaseModel, from_attributes=True):
    """A book as clients send and receive it."""

    isbn: str
    title: str


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


@app.post("/books", status_code=201)
async def add_book(book: BookData) -> None:
    session = await db_session(connect)
    session.add(Book(isbn=book.isbn, title=book.title))


@app.get("/books", response_model=list[BookData])
async def list_books() -> list[Book]:
    session = await db_session(connect)
    return list(await session.scalars(select(Book).order_by(Book.isbn)))
