"""Transfers between accounts, retried after a serialization failure."""

import logging
import os
from contextlib import suppress
from functools import partial

from fastapi import FastAPI
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    db_session,
    on_commit,
    retry_on_transient_error,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///bank.db")
connect = DBConnect.from_url(DATABASE_URL, isolation_level="SERIALIZABLE")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "bank_account"

    owner: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)


class Contact(Base):
    __tablename__ = "contact"

    owner: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app, attempts=5)


@app.put("/accounts/{owner}")
async def open_account(owner: str) -> None:
    session = await db_session(connect)
    await session.merge(Account(owner=owner))


@app.post("/transfers")
async def transfer(source: str, target: str, amount: int) -> None:
    session = await db_session(connect)
    for owner, change in (source, -amount), (target, amount):
        account = await session.get_one(Account, owner)
        account.balance = Account.balance + change
    with suppress(IntegrityError):  # already a contact
        async with atomic_db_session(connect, "savepoint"):
            session.add(Contact(owner=source, name=target))
    on_commit(connect, partial(notify, target, amount))


async def notify(owner: str, amount: int) -> None:
    logging.info("%s received %s", owner, amount)


@retry_on_transient_error(attempts=5)
async def pay_rent() -> None:
    await transfer("tenant", "landlord", 800)
