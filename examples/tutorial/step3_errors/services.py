"""What a library does. The code that calls it commits."""

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy import db_session

from .database import connect
from .models import Book, Loan


class NotFoundError(Exception):
    """There is nothing of the kind."""


class AlreadyThereError(Exception):
    """There is one of the kind, and there can be no other."""


async def add_book(isbn: str, title: str) -> None:
    session = await db_session(connect)
    session.add(Book(isbn=isbn, title=title))
    try:
        await session.flush()
    except IntegrityError:
        raise AlreadyThereError(f"book {isbn} is there already") from None


async def list_books() -> list[Book]:
    session = await db_session(connect)
    return list(await session.scalars(select(Book).order_by(Book.isbn)))


async def find_book(isbn: str) -> Book:
    session = await db_session(connect)
    book = await session.get(Book, isbn)
    if book is None:
        raise NotFoundError(f"no book {isbn}")
    return book


async def lend(isbn: str, reader: str) -> None:
    book = await find_book(isbn)
    book.times_lent += 1
    session = await db_session(connect)
    session.add(Loan(isbn=isbn, reader=reader))


async def take_back(isbn: str) -> None:
    session = await db_session(connect)
    loan = await session.get(Loan, isbn)
    if loan is None:
        raise NotFoundError(f"no loan of {isbn}")
    await session.delete(loan)
