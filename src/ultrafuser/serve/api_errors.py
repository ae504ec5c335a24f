"""Errors as clients get them: a status and OpenAI's error object, which names the field at fault."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ultrafuser.errors import UltraFuserError
from ultrafuser.serve.engine import EngineBusyError, EngineClosedError, GenerationError
from ultrafuser.serve.protocol import UNSUPPORTED_FIELDS, ChatRequest, CompletionRequest
from ultrafuser.serve.responses import ErrorAnswer, ErrorDetail

_SHOWN = 60  # characters of a wrong value
_INVALID, _SERVER = "invalid_request_error", "server_error"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_KNOWN_FIELDS = sorted(ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys())


class APIError(HTTPException, UltraFuserError):
    """A request that fails, with everything that the client is told.

    Attributes:
        param: the field at fault.
        code: for programs.
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
        HTTPException.__init__(self, status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> str:
        return error_body(self.status_code, self.detail, self.param, self.code)

    def response(self) -> Response:
        return Response(self.body(), self.status_code, self.headers, media_type="application/json")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> str:
    kind = _TYPES.get(status, _INVALID if status < 500 else _SERVER)
    return ErrorAnswer(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump_json()


def as_api_error(error: UltraFuserError, retry_after_s: int = 1) -> APIError:
    """What the client is told of an error of the engine or of the templates.

    Args:
        retry_after_s: when a busy server may have room.
    """
    if isinstance(error, APIError):
        return error
    retry = {"Retry-After": str(retry_after_s)}
    if isinstance(error, EngineBusyError):
        return APIError(429, str(error), code="queue_full", headers=retry)
    if isinstance(error, EngineClosedError):
        return APIError(503, str(error), code="shutting_down", headers=retry)
    if isinstance(error, GenerationError):
        return APIError(500, str(error), code="generation_failed")
    return APIError(400, str(error))


def install(app: FastAPI) -> None:
    """Give every error of the app the form of OpenAI's errors."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if isinstance(error, APIError):
            return error.response()
        messages = {404: f"there is no {request.method} {request.url.path}", 405: "this path has no such method"}
        message = messages.get(error.status_code, str(error.detail))
        return APIError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return validation_error(error.errors(), error.body).response()

    @app.exception_handler(Exception)  # the server logs its traceback
    async def unexpected(request: Request, error: Exception) -> Response:
        return APIError(500, "the server failed. Its log says why", code="internal_error").response()


# ---------------------------------------------------------------- fields with wrong values


def validation_error(problems: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """The most specific of pydantic's problems as one line."""
    if not isinstance(body, dict):
        kind = "empty" if body is None or body == b"" else f"a {type(body).__name__}"
        return APIError(400, f"the body is {kind}, expected a JSON object with the fields of a request")
    path, relevant = _most_specific(problems, body)
    problem = relevant[0]
    param, field, code = ".".join(map(str, path)), str(path[0]), None
    if field in UNSUPPORTED_FIELDS:
        message, code, param = f"{field} is not supported: {UNSUPPORTED_FIELDS[field]}", "unsupported_parameter", field
    elif problem["type"] == "missing":
        message, code = f"{param} is missing", "missing_required_parameter"
    elif problem["type"] == "extra_forbidden":
        message, code = (
            f"{param} is unknown here, and this server ignores no fields. {_advice(param)}",
            "unknown_parameter",
        )
    elif problem["type"] == "part_type":
        message, code = f"{param} {problem['msg']}", "unsupported_parameter"
    else:
        expected = " or ".join(dict.fromkeys(p["msg"].removeprefix("Input should be ") for p in relevant))
        message = f"{param} is {_shown(problem['input'])}, expected {expected}"
    return APIError(400, message, param=param, code=code)


def _most_specific(problems: Sequence[Mapping[str, Any]], body: Any) -> tuple[list[str | int], list[Mapping[str, Any]]]:
    """The problems to report, which are all at one path.

    A value that no variant of a union takes gives problems for each variant. The variant that the client meant is the
    one whose problems lie deepest in the body, and of those the one with the fewest problems.
    """
    variants = defaultdict(list)
    for problem in problems:
        path = _path(problem, body)
        variants[tuple(key for key in problem["loc"][1:] if key not in path)].append((path, problem))
    ranks = {tags: (-max(len(path) for path, _ in found), len(found)) for tags, found in variants.items()}
    best = [pair for tags, pairs in variants.items() if ranks[tags] == min(ranks.values()) for pair in pairs]
    path = max((path for path, _ in best), key=len)
    return path, [problem for other, problem in best if other == path]


def _path(problem: Mapping[str, Any], body: Any) -> list[str | int]:
    """The location of a problem in the body, without the names of the union's variants that pydantic puts between."""
    path: list[str | int] = []
    value = body
    for key in problem["loc"][1:]:
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        elif not (problem["type"] == "missing" and key == problem["loc"][-1]):
            continue
        path.append(key)
    return path


def _advice(param: str) -> str:
    nearest = difflib.get_close_matches(param, _KNOWN_FIELDS, n=1)
    return f"Did you mean {nearest[0]}?" if nearest and nearest[0] != param else "Leave it out"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
