"""Shared by all routes: a request's id, log fields and duration, and error replies."""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lvm.errors import DatabaseError, IdentityError, InputError
from serve.guard import error_body
from serve.schema import RefusedError
from serve.service import Service, field_of
from serve.stage import DeadlineError, FullError, StageError, UnavailableError

OUR_FAULT = "internal error in the service; see its log for request {}"


def request_id(request: Request) -> str:
    """The id that the guard assigned."""
    return str(getattr(request.state, "request_id", ""))


def log(request: Request, **fields: Any) -> None:
    """Add fields to the guard's log line of this request."""
    request.scope["state"].setdefault("log", {}).update(fields)


def ms_since(since: float) -> float:
    """Milliseconds since a `time.perf_counter` value."""
    return round((time.perf_counter() - since) * 1000, 3)


def fields_of_body(request: Request) -> list[str]:
    """Names of the fields that the route's body may have."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(body, "field_info", None), "annotation", None)
    return list(getattr(model, "model_fields", {}))


def add_error_replies(app: FastAPI, service: Service) -> None:
    """Register a handler per exception type, which replies with its status in the common error format."""

    async def refused(request: Request, err: Exception) -> Response:
        assert isinstance(err, RefusedError)
        return error_reply(request, err.status, str(err), err.retry_after_s, err.param)

    async def invalid(request: Request, err: Exception) -> Response:
        assert isinstance(err, RequestValidationError)
        first = err.errors()[0]
        # The input is left out: it may be large, secret, or contain a NaN that JSON cannot encode.
        place = [str(p) for p in first["loc"] if p != "body"]
        if first["type"] == "json_invalid":
            at = f"the body is not valid JSON at character {place[-1]}"
            return error_reply(request, 422, f"{at}; send an object as described in /openapi.json")
        if not place and first["type"] in ("model_attributes_type", "dict_type", "missing"):
            message = "the body is no JSON object; send one, with the header Content-Type: application/json"
            return error_reply(request, 422, message)
        why = first["msg"]
        if first["type"] == "extra_forbidden" and len(place) == 1 and (known := fields_of_body(request)):
            why = f"no such field; expected {', '.join(known)}"
        message = f"{'.'.join(place) or 'body'}: {why} (error 1 of {len(err.errors())}); see /openapi.json"
        return error_reply(request, 422, message, param=field_of(place[0]) if place else None)

    async def http_error(request: Request, err: Exception) -> Response:
        assert isinstance(err, HTTPException)
        message = str(err.detail)
        if err.status_code == 404:
            message = f"no route {request.method} {request.url.path[:100]}; /openapi.json lists them"
        elif err.status_code == 400:  # raised by FastAPI for a body that is not JSON
            message = "the body is not valid JSON; send an object as described in /openapi.json"
        return error_reply(request, err.status_code, message)

    async def input_error(request: Request, err: Exception) -> Response:
        return error_reply(request, 422, str(err))

    async def late(request: Request, err: Exception) -> Response:
        service.note(err, request)
        return error_reply(request, 408, f"{err}; ask for less at once, or set a longer deadline_s")

    async def full(request: Request, err: Exception) -> Response:
        assert isinstance(err, FullError)
        service.note(err, request)
        return error_reply(request, 429, str(err), err.retry_after_s)

    async def unavailable(request: Request, err: Exception) -> Response:
        return error_reply(request, 503, str(err), 5)

    async def broken(request: Request, err: Exception) -> Response:
        return error_reply(request, 500, OUR_FAULT.format(request_id(request)))

    for kind, handle in (
        (RefusedError, refused),
        (RequestValidationError, invalid),
        (HTTPException, http_error),
        (InputError, input_error),
        (IdentityError, input_error),
        (DatabaseError, unavailable),
        (DeadlineError, late),
        (FullError, full),
        (UnavailableError, unavailable),
        (StageError, broken),
        (Exception, broken),
    ):
        app.add_exception_handler(kind, handle)


def error_reply(
    request: Request, status: int, message: str, retry_after_s: int | None = None, param: str | None = None
) -> JSONResponse:
    """An error reply. param: the invalid field."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    message = message.encode("utf-8", "replace").decode()  # it may quote an unpaired surrogate
    error = error_body(status, message, request_id(request), request.url.path, param)
    return JSONResponse(error, status, headers)
