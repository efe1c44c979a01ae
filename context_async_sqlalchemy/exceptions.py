"""The exceptions of this library."""

_HINT = (
    "In a web application add the middleware; elsewhere open one with "
    "'async with new_db_session_ctx():' or 'await run_in_new_ctx(f)'; for a session "
    "in no context use 'async with new_non_ctx_session(connect):'."
)


class _HelpfulError(RuntimeError):
    _message: str

    def __init__(self, message: str | None = None) -> None:
        super().__init__(self._message if message is None else message)


class ContextNotInitiatedError(_HelpfulError):
    """A session was requested where there is no context to hold it."""

    _message = f"There is no database session context here. {_HINT}"


class ContextClosedError(ContextNotInitiatedError):
    """A session was requested in a context that has ended, such as by a task after its request."""

    _message = f"The database session context of this task has ended. {_HINT}"


class ContextAlreadyInitiatedError(_HelpfulError):
    """A context was opened by hand inside another one."""

    _message = (
        "There is a database session context already. To open another one inside it, use "
        "'async with new_db_session_ctx():' or 'init_db_session_ctx(force=True)'."
    )


class CommitOutcomeUnknownError(_HelpfulError):
    """The connection was lost during COMMIT: nobody can know whether it took effect.

    The cause is SQLAlchemy's `DBAPIError`, with the driver's error in its `orig`. Before you repeat
    the work, check whether it was done.
    """

    _message = (
        "The connection was lost during COMMIT, and the transaction may have been committed or "
        "not: look before you repeat it."
    )
