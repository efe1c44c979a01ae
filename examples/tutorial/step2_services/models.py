"""The tables."""

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Book(Base):
    __tablename__ = "book"

    isbn: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    times_lent: Mapped[int] = mapped_column(default=0)


class Loan(Base):
    """A book that is lent: to one reader at a time."""

    __tablename__ = "loan"

    isbn: Mapped[str] = mapped_column(ForeignKey(Book.isbn), primary_key=True)
    reader: Mapped[str]
