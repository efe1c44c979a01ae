"""For any ASGI application: the middlewares."""

from typing import TYPE_CHECKING

from context_async_sqlalchemy._engine.wrong_module import says_where
from context_async_sqlalchemy._http.limits import (
    RequestLimitsMiddleware as RequestLimitsMiddleware,
    deadline_settings as deadline_settings,
    set_deadline as set_deadline,
)
from context_async_sqlalchemy._http.middleware import (
    ASGIHTTPDBSessionMiddleware as ASGIHTTPDBSessionMiddleware,
)

if not TYPE_CHECKING:  # which would take every name for one that is there
    __getattr__ = says_where(__name__)
