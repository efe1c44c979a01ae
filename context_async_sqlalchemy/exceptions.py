"""The exceptions of this library."""

from __future__ import annotations

_HINT = (
    "In a web application add the middleware; elsewhere open one with "
    "'async with new_db_session_ctx():' or 'await run_in_new_ctx(f)'; for a session "
    "in no context use 'async with new_non_ctx_session(connect):'."
)


class ContextNotInitiatedError(RuntimeError):
    """A session was requested where there is no context to hold it."""

    def __init__(
        self, message: str = f"There is no database session context here. {_HINT}"
    ) -> None:
        super().__init__(message)


class ContextClosedError(ContextNotInitiatedError):
    """A session was requested in a context that has ended, such as by a task after its request."""

    def __init__(
        self, message: str = f"The database session context of this task has ended. {_HINT}"
    ) -> None:
        super().__init__(message)


class ContextAlreadyInitiatedError(RuntimeError):
    """A context was opened by hand inside another one."""

    def __init__(
        self,
        message: str = "There is a database session context already. To open another one inside "
        "it, use 'async with new_db_session_ctx():' or 'init_db_session_ctx(force=True)'.",
    ) -> None:
        super().__init__(message)


class CommitOutcomeUnknownError(RuntimeError):
    """The connection was lost during COMMIT: nobody can know whether it took effect.

    The cause is SQLAlchemy's `DBAPIError`, with the driver's error in its `orig`. Before you repeat
    the work, check whether it was done.
    """

    def __init__(
        self,
        message: str = "The connection was lost during COMMIT, and the transaction may have been "
        "committed or not: look before you repeat it.",
    ) -> None:
        super().__init__(message)
