"""Contexts that are not requests: a block, and a call."""

from context_async_sqlalchemy._unit.blocks import (
    new_db_session_ctx as new_db_session_ctx,
    run_in_new_ctx as run_in_new_ctx,
)
