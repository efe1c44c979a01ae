"""The exceptions of this library."""

import os

_HINT = (
    "'async with new_db_session_ctx():' or 'await run_in_new_ctx(f)'; for a session "
    "in no context use 'async with new_non_ctx_session(connect):'."
)


class _HelpfulError(RuntimeError):
    _message: str
    _in_a_test: str = ""  # is said, too, while pytest runs one

    def __init__(self, message: str | None = None) -> None:
        if message is None:
            is_test = "PYTEST_CURRENT_TEST" in os.environ
            message = self._message + (self._in_a_test if is_test else "")
        super().__init__(message)


class ContextNotInitiatedError(_HelpfulError):
    """A session was requested where there is no context to hold it."""

    _message = (
        "There is no database session context here. In a web application add the middleware: "
        "'add_fastapi_http_db_session_middleware(app)', "
        "'add_starlette_http_db_session_middleware(app)' or, for any ASGI application, "
        f"'ASGIHTTPDBSessionMiddleware(app)'; elsewhere open one with {_HINT}"
    )
    _in_a_test = (
        " A test that calls such a function itself requests the fixture 'db_context' of "
        "context_async_sqlalchemy.pytest_plugin."
    )


class ContextClosedError(ContextNotInitiatedError):
    """A session was requested in a context that has ended, such as by a task after its request."""

    _message = (
        "The database session context of this task has ended: the task, or job, was started in it, "
        f"such as by a request that is over. Give it a context of its own with {_HINT}"
    )
    _in_a_test = ""


class ContextAlreadyInitiatedError(_HelpfulError):
    """A context was opened by hand inside another one."""

    _message = (
        "There is a database session context already. To open another one inside it, use "
        "'async with new_db_session_ctx():' or 'init_db_session_ctx(force=True)'."
    )


class CommitOutcomeUnknownError(_HelpfulError):
    """The connection was lost during COMMIT: it is not known whether it took effect.

    With `verify_commits` of `from_url`, PostgreSQL did not say in time, or could not. The cause is
    SQLAlchemy's `DBAPIError`, with the driver's error in its `orig`. Before you repeat the work,
    check whether it was done.
    """

    _message = (
        "The connection was lost during COMMIT, and the transaction may have been committed or "
        "not: look before you repeat it."
    )
