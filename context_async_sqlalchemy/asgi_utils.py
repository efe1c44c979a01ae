"""For any ASGI application: the middleware."""

from context_async_sqlalchemy._http.middleware import (
    ASGIHTTPDBSessionMiddleware as ASGIHTTPDBSessionMiddleware,
)
