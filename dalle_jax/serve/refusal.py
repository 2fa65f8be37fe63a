"""Every answer that is not what was asked for, in the error shape of OpenAI's API."""

from collections.abc import Mapping

from starlette.responses import JSONResponse

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class Refusal(Exception):
    """Raised wherever a request can't be served; `response()` is what the client gets.

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
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict:
        """{"error": {message, type, param, code}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def invalid(param: str | None, message: str, *, code: str = "invalid_value") -> Refusal:
    """A parameter that the model or this server can't honour: status 400."""
    return Refusal(400, message, code=code, param=param)
