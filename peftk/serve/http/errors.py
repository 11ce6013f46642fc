"""Errors as OpenAI's API has them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from peftk.checkpoints.files import CheckpointError
from peftk.serve.requests import QueueFullError

log = logging.getLogger("peftk.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An answer with an error in it. retry_after: seconds, for the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["Connection"] = "close"  # what is left of the body is not read
        return JSONResponse(self.body, self.status, headers)


def of(error: BaseException) -> APIError:
    """What a client is told about an error of an engine or embedder. It names no file of this machine."""
    match error:
        case APIError():
            return error
        case QueueFullError():
            return APIError(429, "The queue is full; try again later.", code="queue_full", retry_after=1)
        case CheckpointError():
            log.error("an adapter could not be loaded: %s", error)
            return APIError(500, "The adapter's checkpoint could not be loaded.", code="adapter_failed")
        case ValueError() | TypeError():
            return APIError(400, str(error))
        case TimeoutError():
            return APIError(504, "The request has taken too long.", code="deadline_exceeded")
        case _:
            log.error("a request has failed", exc_info=error)
            return APIError(503 if isinstance(error, RuntimeError) else 500, "The server could not do this.")


def install(app: FastAPI) -> None:
    """Makes every error of an app one of OpenAI's shape."""

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return APIError(404, f"There is no endpoint {request.url.path}.", code="not_found").response()
        return APIError(error.status_code, error.detail).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return APIError(400, "The body is no valid JSON.", code="json_invalid").response()
        path = [str(part) for part in first["loc"] if part != "body"]
        param = first.get("ctx", {}).get("param") or (path[0] if path else None)
        message = first["msg"] if param is None else f"{param}: {first['msg']}"
        return APIError(400, message, param=param, code=first["type"]).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return APIError(500, "The server has failed.").response()
