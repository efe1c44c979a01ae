"""What a request did with its databases: reported at its end, and a slow statement at once."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.observed import Kind, Observer, Step, listen, observe
from context_async_sqlalchemy._http.options import is_async
from context_async_sqlalchemy._http.sql_comments import checked_keys, route_of, with_comment
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What a request did with its databases, with its child and background tasks.

    Attributes:
        method: The method of the request.
        path: Its path, without the query string.
        route: The template of the path, such as "/users/{id}", in FastAPI and Starlette 1.0; or "".
        statements: How many were sent, without those that begin and end a transaction.
        statement_seconds: How long they took together, until the first row of a streamed result.
        waiting_seconds: How long the request waited for connections, including opening them.
        holding_seconds: How long it held connections, those of several added up.
        slowest: The text of the slowest statement, without parameters; None if there is none.
        slowest_seconds: How long that took.
    """

    method: str
    path: str
    route: str
    statements: int
    statement_seconds: float
    waiting_seconds: float
    holding_seconds: float
    slowest: str | None
    slowest_seconds: float


class ASGIRequestReportMiddleware:
    """Report what each HTTP request does with its databases, whichever they are.

        app.add_middleware(ASGIRequestReportMiddleware, report=print, slow_query_threshold=0.5)

    Add it after the middleware of the sessions, and so around it: the report then includes COMMIT
    in the time a connection is held.

    Args:
        app: The ASGI application.
        report: Called with a `RequestReport` when the application has returned, or raised. An
            exception of it is logged. Default None.
        slow_query_threshold: Log a warning after a statement that took longer than this, in
            seconds. It has the method and the path of the request, and no parameters. Default None.
        sql_comments: What a comment at the end of each statement says, in the format of
            sqlcommenter: "route"; "traceparent", in a sampled trace. Default: no comment.

    Raises:
        TypeError: If `report` is not a function, or is an async one.
        ValueError: If `slow_query_threshold` is not a positive number, or there is no such comment.
    """

    def __init__(
        self,
        app: ASGIApp,
        report: Callable[[RequestReport], None] | None = None,
        *,
        slow_query_threshold: float | None = None,
        sql_comments: Collection[str] = (),
    ) -> None:
        if report is not None and (not callable(report) or is_async(report)):
            raise TypeError("report must be a function, not an async one, of a RequestReport")
        if slow_query_threshold is not None and not slow_query_threshold > 0:
            raise ValueError(
                f"slow_query_threshold must be more than 0 seconds, not {slow_query_threshold}"
            )
        self.app = app
        self.report = report
        self.slow_query_threshold = slow_query_threshold
        self.sql_comments = checked_keys(sql_comments)
        listen()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_new = not scope.get(_SCOPE_KEY)  # no other middleware of this class is around it
        scope[_SCOPE_KEY] = True
        watch = _Watch(scope, self.slow_query_threshold, self.sql_comments)
        try:
            with observe(watch, new_request=is_new):
                await self.app(scope, receive, send)
        finally:
            if self.report is not None:
                try:
                    self.report(watch.result())
                except Exception:
                    logger.exception("The report of a request failed (%s)", watch.name)


_SCOPE_KEY = "context_async_sqlalchemy.report"
_LONGEST = 1000  # characters of a statement in the log


class _Watch(Observer):
    """Adds up what one request does."""

    is_request = True

    def __init__(self, scope: Scope, threshold: float | None, comments: frozenset[str]) -> None:
        self._scope = scope
        self._threshold = threshold
        self._comments = comments
        self._count = 0
        self._seconds = [0.0, 0.0, 0.0]  # by kind
        self._open: dict[Step, None] = {}
        self._slowest: str | None = None
        self._slowest_seconds = 0.0

    @property
    def name(self) -> str:
        # The client chooses the path, and may put line breaks into it: a repr has none.
        return f"{self._scope.get('method', '')} {self._scope.get('path', '')!r}"

    def began(self, step: Step) -> None:
        self._open[step] = None
        self._count += step.kind is Kind.STATEMENT

    def ended(self, step: Step) -> None:
        del self._open[step]
        self._add(step)
        if step.kind is Kind.STATEMENT and self._threshold and step.so_far() > self._threshold:
            logger.warning(
                "A statement of the request %s took %.2f seconds: %s",
                self.name,
                step.so_far(),
                " ".join(step.text[:_LONGEST].split()),
            )

    def rewritten(self, text: str, is_formatted: bool) -> str:
        return with_comment(text, self._comments, self._scope, is_formatted)

    def result(self) -> RequestReport:
        for step in self._open:  # it belongs to a task that outlives the request
            self._add(step)
        return RequestReport(
            self._scope.get("method", ""),
            self._scope.get("path", ""),
            route_of(self._scope),
            self._count,
            self._seconds[Kind.STATEMENT],
            self._seconds[Kind.WAIT],
            self._seconds[Kind.USE],
            self._slowest,
            self._slowest_seconds,
        )

    def _add(self, step: Step) -> None:
        seconds = step.so_far()
        self._seconds[step.kind] += seconds
        if step.kind is Kind.STATEMENT and seconds > self._slowest_seconds:
            self._slowest, self._slowest_seconds = step.text, seconds
