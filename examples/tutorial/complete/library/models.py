"""The tables."""

from sqlalchemy import ForeignKey, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    # Names for the constraints, so that a later migration can drop them.
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )


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
    reminded: Mapped[bool] = mapped_column(default=False)
