"""The `send` of a request, which settles its context before the response starts."""

from collections.abc import Callable

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.release import is_in_use, wait_until_idle
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy._unit.lost_work import tell_of_lost_work
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback, settle_request
from context_async_sqlalchemy.asgi_types import ASGIApp, Message, Send


class SettlingSend:
    """The `send` that the application gets instead of the server's."""

    def __init__(
        self,
        context: DBSessionContext,
        send: Send,
        app: ASGIApp,
        before_commit: BeforeCommitCallback | None,
        commit_on: Callable[[int], bool],
    ) -> None:
        self.context = context
        self.send = send
        self.app = app
        self.before_commit = before_commit
        self.commit_on = commit_on
        self.started = False
        self.completed = False  # the last part of the body was sent
        self.commit = False  # what the status of the response asks for
        self.failure: Exception | None = None  # kept a response from starting

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.commit = self.commit_on(message["status"])
            if self.context.used:
                if not self.commit or self.context.rolls_back:
                    tell_of_lost_work(self.context, message["status"])
                try:
                    await self._settle(self.commit)
                except Exception as error:
                    self.failure = error
                    raise
            self.started = True
        elif self.started and ends_body(message):
            if self.context.used:
                # A client that has the whole body must be able to rely on what it says.
                await self._settle(True)
            self.completed = True
        await self.send(message)

    def succeeded(self) -> bool:
        """Return whether to commit what is open when the application has returned."""
        if self.started and not self.completed and self.context.in_transaction():
            # Starlette stops the body of a client that hangs up, and returns as if it had ended.
            logger.warning(
                "A response was not completed, as when its client hangs up: what was written after "
                "it had started is rolled back."
            )
        return self.completed and (self.commit or not self.context.settles_late)

    async def _settle(self, commit: bool) -> None:
        if not self.context.settles_late:
            sessions = self.context.sessions
            if any(map(is_in_use, sessions)) and _runs_in_another_task(self.app):
                await wait_until_idle(sessions)
            await settle_request(self.context, commit=commit, before_commit=self.before_commit)


def ends_body(message: Message) -> bool:
    """Return whether a message is the last part of a body, or the whole of it."""
    # https://asgi.readthedocs.io/en/latest/extensions.html: what is a body, and what is none, such
    # as "http.response.push".
    bodies = ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")
    return message["type"] in bodies and not message.get("more_body", False)


def _runs_in_another_task(app: ASGIApp) -> bool:
    # Inside a BaseHTTPMiddleware of Starlette the application goes on with its body while its
    # response is started out here. That it may be inside a statement is not a mistake then.
    inner: object = app
    while inner is not None:
        if any(cls.__name__ == "BaseHTTPMiddleware" for cls in type(inner).__mro__):
            return True
        inner = getattr(inner, "app", None) or getattr(inner, "middleware_stack", None)
    return False
