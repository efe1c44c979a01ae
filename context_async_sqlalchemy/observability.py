"""What a request, or a test, does with its databases: counted, timed, reported."""

from context_async_sqlalchemy._engine.queries import assert_queries, count_queries
from context_async_sqlalchemy._http.request_report import ASGIRequestReportMiddleware, RequestReport

__all__ = ["ASGIRequestReportMiddleware", "RequestReport", "assert_queries", "count_queries"]
