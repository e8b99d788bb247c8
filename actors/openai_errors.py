"""Refusals in the form of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException

from actors.retrying import LOST, AnswerChanged, WeightsChanged


@dataclass
class ApiError(Exception):
    """What a caller is told instead of an answer. `param` names the field that is wrong."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def from_validation(error: ValidationError, neutral: Mapping[str, tuple[Any, ...]]) -> ApiError:
    """The first thing wrong with a body. neutral: values that a parameter may have, though it is
    not supported."""
    first = error.errors(include_url=False, include_context=False)[0]
    # A choice between forms adds the form's name to the place, in words of pydantic.
    place = ".".join(str(part) for part in first["loc"] if _is_field(part))
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['msg']}.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        value = f" but as {json.dumps(neutral[place][0])}" if place in neutral else ""
        return ApiError(
            400,
            f"The parameter {place} is not supported here{value}; leave it out.",
            place,
            "unsupported_parameter",
        )
    if first["type"] == "missing":
        return ApiError(
            400, f"The parameter {place} is missing.", place, "missing_required_parameter"
        )
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    where = f"{place}: " if place else ""
    return ApiError(400, f"{where}{message}.", place or None, "invalid_value")


def _is_field(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float"))


def from_failure(error: Exception) -> ApiError | None:
    """What a failed generation means for the caller; None where it is this program's fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return ApiError(
            429,
            "Too many requests are waiting; try again in a moment.",
            code="rate_limit_exceeded",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, ValueError):  # of the engine, also where Ray brings it
        return ApiError(400, str(getattr(error, "cause", None) or error), code="invalid_value")
    if isinstance(
        error, (*LOST, WeightsChanged, AnswerChanged, RayServeException, TaskCancelledError)
    ):
        return ApiError(
            503,
            "No generator can answer now; try again in a moment.",
            code="service_unavailable",
            headers={"Retry-After": "5"},
        )
    return None
