"""`ApiError`: any response other than the requested one, in the error format of OpenAI's API."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class ApiError(HTTPException):
    """Raised wherever a request cannot be served; `response()` is what the client gets.

    status: HTTP status. param: the parameter at fault, as the client named it. code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict:
        """{"error": {message, type, param, code}}."""
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status_code, headers=self.headers)


def invalid(param: str | None, message: str, *, code: str = "invalid_value") -> ApiError:
    """Status 400: a parameter that the model or this server cannot honor."""
    return ApiError(400, message, code=code, param=param)


def too_late() -> ApiError:
    """Status 504, with the header that keeps OpenAI's clients from repeating a request that takes too long."""
    message = "the images were not finished within this server's deadline"
    return ApiError(504, message, code="deadline_exceeded", headers={"X-Should-Retry": "false"})


def failed() -> ApiError:
    """Status 500: the pipeline raised an exception."""
    return ApiError(500, "the images could not be drawn; the server's log says why", code="draw_failed")
