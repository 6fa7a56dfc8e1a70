"""Errors in OpenAI's shape."""

from dataclasses import dataclass
from typing import Any

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


@dataclass(eq=False)  # not frozen: whoever passes an exception on writes its traceback
class ApiError(Exception):
    """A request, or one item of it, that cannot be answered.

    Attributes:
        status: of HTTP.
        code: a word that programs tell errors by.
        message: what is wrong and what to do; never an input's content.
        param: the place in the request.
        index: of the item, in a request with several.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    index: int | None = None

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        told: dict[str, Any] = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        if self.index is not None:
            told["index"] = self.index
        return {"error": told}
