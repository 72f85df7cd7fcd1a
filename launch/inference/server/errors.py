"""What a client did wrong, or what we could not do, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cluster.yamlfile import shown


class ApiError(Exception):
    """An answer that is an error: its HTTP status, a sentence, the parameter it is about and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """OpenAI's type for the status."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def bad(param: str, message: str, *, code: str | None = None) -> ApiError:
    """400: one parameter is wrong."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def of_validation(error: ValidationError) -> ApiError:
    """400: the first thing that a body's shape refuses, told in the parameter's own words."""
    first = error.errors(include_url=False, include_context=True)[0]
    param = ".".join(str(part) for part in first["loc"]) or "body"
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return bad(param, "no such parameter here", code="unknown_parameter")
    if kind == "missing":
        return bad(param, "is required", code="missing_required_parameter")
    if kind == "value_error":
        what = str(context["error"])
        return bad(param, what, code="invalid_value") if first["loc"] else ApiError(400, what, code="invalid_value")
    return bad(param, f"{_sentence(first['msg'])}, not {shown(first['input'])}", code="invalid_value")


def _sentence(message: str) -> str:
    for start in ("Input should be a valid ", "Input should be "):
        if message.startswith(start):
            return "must be " + message.removeprefix(start)
    return message[:1].lower() + message[1:]
