"""Errors as OpenAI's clients read them."""

from typing import Any

# What the `type` of an error is by its status; clients choose their exception by the status alone.
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
      status: of HTTP.
      message: what is wrong and what to do.
      param: the field of the request that is meant.
      code: a word for programs, such as "context_length_exceeded".
      headers: besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return {
            "error": {
                "message": str(self),
                "type": _KINDS.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }
