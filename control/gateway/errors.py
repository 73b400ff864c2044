"""The HTTP edge's errors: one type with a status, and its body in each API's shape."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from control.errors import ControlError, NotReady, UnknownModel
from control.gateway.json_response import Json

KIND_BY_STATUS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

ANTHROPIC_KIND_BY_STATUS: Final = {  # where it has another name
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}

# Kinds of errors while the cluster elects a leader, and how long an election takes, seconds.
LEADERLESS: Final = frozenset({"no_leader", "no_authority", "leader_lost", "leader_changed"})
ELECTION_S: Final = 4

CODE_BY_FAULT: Final = {  # pydantic's error types that have a better known name
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "not_supported": "unsupported_value",
}


class ApiError(HTTPException):
    """An answer to a request that cannot be served. An HTTPException, so that FastAPI lets it pass.

    Attributes:
        message: what failed, the numbers, the next step.
        param: the field at fault, such as ``messages[0].content``.
        code: short machine-readable reason.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def kind(self) -> str:
        """OpenAI's ``type`` of this error."""
        return KIND_BY_STATUS.get(self.status_code, "invalid_request_error")


class ErrorFields(BaseModel):
    """OpenAI's error object, for the API description."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorFields


DESCRIBED: Final[dict[str, Any]] = {
    "model": ErrorBody,
    "description": "Refused or failed; 429 and 503 say when to try again (Retry-After, seconds).",
}


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class GenerationFailed(Exception):
    """A generation ended with ``error`` or ``cancelled``; the text says why."""


def context_exceeded(prompt_tokens: int, context_tokens: int, *, param: str) -> ApiError:
    """The prompt leaves no room for a single token."""
    return ApiError(
        400,
        f"This model's context holds {context_tokens} tokens, and the prompt alone has "
        f"at least {prompt_tokens}. Shorten the prompt to at most {context_tokens - 1} tokens.",
        param=param,
        code="context_length_exceeded",
    )


def from_exception(exc: Exception) -> ApiError | None:
    """The answer to an error that a request may meet; None when it is a bug of ours."""
    match exc:
        case ApiError():
            return exc
        case RequestValidationError():
            return from_validation(exc)
        case HTTPException():  # FastAPI's own, raised only for a body it cannot read
            return ApiError(400, "the body is not valid JSON in UTF-8.", code="invalid_json")
        case UnknownModel():
            return ApiError(404, str(exc), param="model", code="model_not_found")
        case NotReady():
            wait_s = max(1, math.ceil(exc.retry_after_s))
            headers = {"Retry-After": str(wait_s)}
            return ApiError(503, str(exc), param="model", code=exc.kind, headers=headers)
        case ControlError() if exc.kind in LEADERLESS:
            headers = {"Retry-After": str(ELECTION_S)}
            return ApiError(503, str(exc), code=exc.kind, headers=headers)
        case ControlError():
            status = 404 if exc.kind == "not_found" else 400
            return ApiError(status, str(exc), code=exc.kind)
        case GenerationFailed():
            return ApiError(500, str(exc), code="generation_failed")
        case _:
            return None


def trace_of(exc: BaseException) -> str:
    """Where a bug of ours happened, for the log: code alone, no values (they may be secrets)."""
    return "".join(traceback.format_exception(exc))


def internal(request_id: str) -> ApiError:
    """The answer to a bug of ours: no detail leaves the process, the log has it."""
    text = f"internal error; the server's log has the details under request id {request_id}."
    return ApiError(500, text, code="internal_error")


def from_validation(exc: RequestValidationError) -> ApiError:
    """One clear 400 out of pydantic's list: the fault found deepest in the body comes first.

    A field with several allowed forms yields one fault a form; the deepest is the form meant.
    """
    faults = [(_path_in(exc.body, fault), fault) for fault in exc.errors()]
    path, fault = max(faults, key=lambda found: len(found[0]))
    param = _written(path) or fault.get("ctx", {}).get("param")
    kind = str(fault["type"])
    if kind == "json_invalid":
        where = fault["loc"][-1]
        why = fault.get("ctx", {}).get("error", "")
        return ApiError(
            400, f"the body is not valid JSON: {why} at character {where}.", code="invalid_json"
        )
    if kind == "extra_forbidden":
        text = f"{param} is not a field that this route honours. Remove it; /docs lists them all."
    elif param is None:
        text = f"the body must be a JSON object: {fault['msg']}."
    else:
        text = f"{param}: {fault['msg']}."
    return ApiError(400, text, param=param, code=CODE_BY_FAULT.get(kind, "invalid_value"))


def _path_in(body: Any, fault: Mapping[str, Any]) -> list[str | int]:
    """The part of a fault's location that names the body's fields; tags of unions are left out."""
    source, *steps = fault["loc"]
    if source != "body":
        return list(fault["loc"][1:])
    path: list[str | int] = []
    here = body
    for step in steps:
        if (isinstance(here, dict) and step in here) or (
            isinstance(here, list) and isinstance(step, int) and step < len(here)
        ):
            here = here[step]
        elif not (fault["type"] == "missing" and step == steps[-1]):
            continue
        path.append(step)
    return path


def _written(path: list[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


def openai_body(error: ApiError) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``."""
    shown = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": shown}


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's shape with Anthropic's outer ``type`` and its names of kinds."""
    shown = openai_body(error)["error"]
    kind = ANTHROPIC_KIND_BY_STATUS.get(error.status_code, error.kind)
    return {"type": "error", "error": {**shown, "type": kind}}


def ollama_body(error: ApiError) -> dict[str, Any]:
    """``{"error": text}``."""
    return {"error": error.message}


SHAPES: Final[tuple[tuple[str, Callable[[ApiError], dict[str, Any]]], ...]] = (
    ("/v1/messages", anthropic_body),
    ("/api/", ollama_body),
    ("/", openai_body),
)


def body_for(path: str, error: ApiError) -> dict[str, Any]:
    """The error in the shape that clients of this route read; the first matching prefix rules."""
    shape = next((shape for prefix, shape in SHAPES if path.startswith(prefix)), openai_body)
    return shape(error)


def response_for(path: str, error: ApiError) -> Json:
    """The error as a response, with its headers (``Retry-After``, ``Allow``)."""
    return Json(body_for(path, error), error.status_code, headers=error.headers)
