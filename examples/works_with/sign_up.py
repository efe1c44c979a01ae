"""Users of fastapi-users, in the transaction of the request."""

import os
import uuid
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
from fastapi_users.authentication import (
    AuthenticationBackend,
    BearerTransport,
    JWTStrategy,
)
from fastapi_users_db_sqlalchemy import (
    SQLAlchemyBaseUserTableUUID,
    SQLAlchemyUserDatabase,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from examples.works_with.commits_later import commits_later

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///members.db")
SECRET = os.environ.get("SECRET", "only for this example, and 32 bytes")
connect = DBConnect.from_url(DATABASE_URL)


class Base(DeclarativeBase):
    pass


class User(SQLAlchemyBaseUserTableUUID, Base):
    __tablename__ = "works_with_user"


class Welcome(Base):
    __tablename__ = "works_with_welcome"

    email: Mapped[str] = mapped_column(primary_key=True)


class UserRead(schemas.BaseUser[uuid.UUID]):
    pass


class UserCreate(schemas.BaseUserCreate):
    pass


Session = Annotated[AsyncSession, Depends(DBSessionDependency(connect))]


async def get_user_db(
    session: Session,
) -> SQLAlchemyUserDatabase[User, uuid.UUID]:
    return SQLAlchemyUserDatabase(commits_later(session), User)


class UserManager(UUIDIDMixin, BaseUserManager[User, uuid.UUID]):
    async def on_after_register(
        self, user: User, request: Request | None = None
    ) -> None:
        session = await db_session(connect)
        session.add(Welcome(email=user.email))


UserDatabase = Annotated[Any, Depends(get_user_db)]


async def get_user_manager(user_db: UserDatabase) -> UserManager:
    return UserManager(user_db)


def get_strategy() -> JWTStrategy[User, uuid.UUID]:
    return JWTStrategy(secret=SECRET, lifetime_seconds=3600)


backend = AuthenticationBackend("jwt", BearerTransport("login"), get_strategy)
users = FastAPIUsers[User, uuid.UUID](get_user_manager, [backend])


app = FastAPI(lifespan=database_lifespan(connect, create_tables=Base.metadata))
app.include_router(users.get_register_router(UserRead, UserCreate))
app.include_router(users.get_auth_router(backend))
add_fastapi_http_db_session_middleware(app)


@app.exception_handler(IntegrityError)
async def conflict(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse(
        {"detail": "REGISTER_USER_ALREADY_EXISTS"}, status_code=400
    )


@app.get("/me")
async def get_me(
    user: Annotated[User, Depends(users.current_user(active=True))],
) -> str:
    return user.email
