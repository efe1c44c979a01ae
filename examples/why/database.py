"""Shared by the programs beside this one: two tables, and a pool of a single connection.

Who keeps that connection from the others is noticed at once.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///tickets.db")

engine = create_async_engine(
    DATABASE_URL, pool_size=1, max_overflow=0, pool_timeout=0.2
)
session_maker = async_sessionmaker(engine, expire_on_commit=False)

connect = DBConnect.from_url(
    DATABASE_URL, pool_size=1, max_overflow=0, pool_timeout=0.2
)


class Base(DeclarativeBase):
    pass


class Booking(Base):
    __tablename__ = "booking"

    seat: Mapped[str] = mapped_column(primary_key=True)


class Guest(Base):
    __tablename__ = "guest"

    name: Mapped[str] = mapped_column(primary_key=True)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()
    await connect.close()
