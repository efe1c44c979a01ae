"""Settings from the environment: those for production, and those for development."""

import os
import secrets

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Development: every setting has a default, and SQL is logged."""

    # Otherwise pydantic's error for a missing setting would show the values of the others.
    model_config = SettingsConfigDict(hide_input_in_errors=True)

    # Made anew by each process: one that stood here would be known to everybody.
    jwt_secret: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_hex(32))
    )
    database_url: SecretStr = SecretStr("sqlite:///tasks.db")
    database_echo: bool = True
    database_pool_size: int = 2
    database_max_overflow: int = 5
    database_pool_pre_ping: bool = False
    database_pool_recycle: int = -1
    database_timeout: int = (
        30  # seconds to wait for a connection; SQLite: for the write lock
    )


class ProductionSettings(Settings):
    """Production, unless the environment says otherwise: secrets have no default."""

    jwt_secret: SecretStr = Field(min_length=32)
    database_url: SecretStr
    database_echo: bool = False
    database_pool_size: int = 5
    database_max_overflow: int = 10
    database_pool_pre_ping: bool = True
    database_pool_recycle: int = 3600
    database_timeout: int = 10


def load_settings() -> Settings:
    environment = os.environ.get("ENVIRONMENT", "production")
    if environment not in ("development", "production"):
        raise ValueError(
            f"ENVIRONMENT must be development or production, not {environment!r}"
        )
    settings: type[Settings] = (
        Settings if environment == "development" else ProductionSettings
    )
    try:
        return settings()
    except ValidationError as error:
        error.add_note(
            "On your own machine, ENVIRONMENT=development has defaults for the rest."
        )
        raise


settings = load_settings()
