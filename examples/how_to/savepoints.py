"""An import of contacts in one transaction, parts of which may fail alone."""

import os
from contextlib import suppress

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import ForeignKey
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    db_session,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///contacts.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Import(Base):
    __tablename__ = "contact_import"

    file: Mapped[str] = mapped_column(primary_key=True)


class Contact(Base):
    __tablename__ = "imported_contact"

    email: Mapped[str] = mapped_column(primary_key=True)
    nickname: Mapped[str | None] = mapped_column(unique=True)


class Phone(Base):
    __tablename__ = "contact_phone"

    number: Mapped[str] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(ForeignKey(Contact.email))


class NewContact(BaseModel):
    email: str
    phones: list[str] = []


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


@app.post("/imports/{file}")
async def import_contacts(file: str, contacts: list[NewContact]) -> list[str]:
    session = await db_session(connect)
    session.add(Import(file=file))
    await session.flush()
    refused = []
    for contact in contacts:
        try:
            async with atomic_db_session(connect, "savepoint"):
                await add_contact(contact)
        except IntegrityError:
            refused.append(contact.email)
    return refused


async def add_contact(new: NewContact) -> None:
    session = await db_session(connect)
    session.add(Contact(email=new.email))
    await session.flush()  # fails here, not when the next savepoint begins
    for number in new.phones:
        with suppress(IntegrityError):  # taken: store the contact without it
            async with atomic_db_session(connect, "savepoint"):
                session.add(Phone(number=number, email=new.email))


@app.put("/contacts/{email}/nickname/{nickname}")
async def rename(email: str, nickname: str) -> str | None:
    session = await db_session(connect)
    contact = await session.get_one(Contact, email)
    try:
        async with atomic_db_session(connect, "savepoint"):
            contact.nickname = nickname
    except IntegrityError:
        await session.refresh(contact)
    return contact.nickname
