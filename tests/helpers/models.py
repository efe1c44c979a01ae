"""The tables that the tests use."""

from __future__ import annotations

from sqlalchemy import String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Item(Base):
    """A row with a unique name."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)


class Seat(Base):
    """A row whose number is checked for uniqueness only at COMMIT."""

    __tablename__ = "seat"
    __table_args__ = (UniqueConstraint("number", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Account(Base):
    """Money."""

    __tablename__ = "purse"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Transfer(Base):
    """An entry of the ledger; only the application keeps it from being stored twice."""

    __tablename__ = "ledger"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]
    source: Mapped[int]
    target: Mapped[int]
    amount: Mapped[int]
