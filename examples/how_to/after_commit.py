"""Mail sent once the sign-up is committed, and only then."""

import logging
import os
from contextlib import suppress
from functools import partial

from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    db_session,
    on_commit,
)
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///members.db")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class Member(Base):
    __tablename__ = "member"

    email: Mapped[str] = mapped_column(primary_key=True)


class Voucher(Base):
    __tablename__ = "used_voucher"

    code: Mapped[str] = mapped_column(primary_key=True)


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
add_fastapi_http_db_session_middleware(app)


@app.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "there already"}, status_code=409)


async def send_mail(to: str, subject: str) -> None:
    logging.info("%r: %s", to, subject)  # call your mail service here


@app.post("/members/{email}", status_code=201)
async def sign_up(email: str) -> None:
    session = await db_session(connect)
    session.add(Member(email=email))
    on_commit(connect, partial(send_mail, email, "Welcome"))


@app.post("/members/{email}/vouchers/{code}", status_code=201)
async def sign_up_with_voucher(email: str, code: str) -> None:
    await sign_up(email)
    session = await db_session(connect)
    await session.flush()
    with suppress(IntegrityError):  # already used: sign up without the voucher
        async with atomic_db_session(connect, "savepoint"):
            on_commit(connect, partial(send_mail, email, "Your discount"))
            session.add(Voucher(code=code))


@app.delete("/members/{email}", status_code=204)
async def leave(email: str, background: BackgroundTasks) -> None:
    session = await db_session(connect)
    await session.execute(delete(Member).where(Member.email == email))
    on_commit(
        connect, partial(background.add_task, send_mail, email, "Goodbye")
    )
