"""The current user, from a JSON Web Token."""

from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

import jwt
from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from context_async_sqlalchemy import db_session
from examples.sqlmodel_tasks.database import connect
from examples.sqlmodel_tasks.models import User
from examples.sqlmodel_tasks.settings import settings

ALGORITHM = "HS256"
LIFETIME = timedelta(hours=1)

Credentials = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False)),  # older versions would answer 403
]


def make_token(user_id: UUID) -> str:
    claims = {"sub": str(user_id), "exp": datetime.now(UTC) + LIFETIME}
    return jwt.encode(claims, settings.jwt_secret.get_secret_value(), ALGORITHM)


async def get_optional_user(credentials: Credentials) -> User | None:
    if credentials is None:
        return None
    try:
        claims = jwt.decode(
            credentials.credentials,
            settings.jwt_secret.get_secret_value(),
            algorithms=[ALGORITHM],
            options={"require": ["exp", "sub"]},
        )
        user_id = UUID(claims["sub"])
    except (jwt.InvalidTokenError, ValueError):
        return None
    session = await db_session(connect)
    return await session.get(User, user_id)


async def get_current_user(
    user: Annotated[User | None, Depends(get_optional_user)],
) -> User:
    if user is None:
        raise HTTPException(
            401, "log in first", headers={"WWW-Authenticate": "Bearer"}
        )
    return user


CurrentUser = Annotated[User, Depends(get_current_user)]
