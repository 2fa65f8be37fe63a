"""`Guard`: the checks before a request's body is read (host, origin, token), counters, and safe headers."""

import hmac
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle_jax.serve.errors import ApiError
from dalle_jax.serve.metrics import Metrics

# Paths that a browser or a load balancer opens without a token; the names of images cannot be guessed.
HEALTH = "/health"
OPEN_PATHS = ("/", HEALTH)
FILES = "/v1/images/files/"
MAX_HEAD_BYTES = 32 * 2**10  # of a request line with its headers
DISCONNECTED = 499  # nginx's status for a client that went away before there was an answer
_HOST = re.compile(r"[\w.-]+(:\d{1,5})?|\[[0-9a-fA-F:.]+\](:\d{1,5})?", re.ASCII)
_SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware. token: what `Authorization: Bearer` must carry; None admits everybody."""

    def __init__(self, app: ASGIApp, *, token: str | None, metrics: Metrics):
        self._app, self._token, self._metrics = app, token, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), DISCONNECTED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            error = self._error(scope)
            if error is None:
                await self._app(scope, receive, watched)
            else:
                self._metrics.rejected.labels(error.code).inc()
                await error.response()(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.request_seconds.labels(endpoint).observe(time.monotonic() - start)

    def _error(self, scope: Scope) -> ApiError | None:
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = headers.get("host", ""), headers.get("origin")
        head = len(scope["raw_path"]) + len(scope["query_string"])
        if head + sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"]) > MAX_HEAD_BYTES:
            return ApiError(431, f"the head must be at most {MAX_HEAD_BYTES} bytes", code="head_too_large")
        if not _HOST.fullmatch(host) and (host or path != HEALTH):  # load balancers ask in HTTP/1.0, which has no host
            return ApiError(
                400, "the Host header must be a name or an address, with a port or none", code="invalid_host"
            )
        if origin is not None and origin.partition("://")[2] != host:
            # A page of another site must not draw with the visitor's server: browsers send forms across sites.
            message = "requests from pages of other sites are not served; a proxy in front must pass the Host header on"
            return ApiError(403, message, code="foreign_origin")
        if self._token is None or path in OPEN_PATHS or path.startswith(FILES):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() == "bearer" and same:
            return None
        message = "a bearer token is needed: send `Authorization: Bearer TOKEN`"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
