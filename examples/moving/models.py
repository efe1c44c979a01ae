"""The tables of a library."""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Loan(Base):
    __tablename__ = "loan"

    book: Mapped[str] = mapped_column(primary_key=True)
    reader: Mapped[str]


class Entry(Base):
    __tablename__ = "diary_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
