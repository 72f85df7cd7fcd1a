"""The routes, put together: what each path answers, and how errors of every kind become OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from launch.inference.server import metrics
from launch.inference.server.chat import Chat
from launch.inference.server.completions import Completions
from launch.inference.server.errors import ApiError, of_validation
from launch.inference.server.guard import App, Door, Guard
from launch.inference.server.service import Service
from launch.inference.server.shapes import ChatRequest, CompletionRequest

M = TypeVar("M", bound=BaseModel)

_PAGE = Path(__file__).with_name("page")
_PAGES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_SAFE = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def application(service: Service, door: Door) -> App:
    """The whole endpoint as an ASGI application."""
    app = FastAPI(title="sparkctl", version=service.version, docs_url=None, redoc_url=None, openapi_url=None)
    _page(app)
    _state(app, service)
    _asking(app, service)
    _errors(app)
    return _Counted(Guard(app, door), service, frozenset(getattr(route, "path", "") for route in app.routes))


def _page(app: FastAPI) -> None:
    for path, (name, kind) in _PAGES.items():
        content = (_PAGE / name).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=_SAFE)

        app.get(path, include_in_schema=False)(page)

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204, headers=_SAFE)


def _state(app: FastAPI, service: Service) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """Whether the process works; a service manager restarts it where not."""
        return JSONResponse(
            {"status": "live"} if service.alive() else {"status": "dead"}, 200 if service.alive() else 503
        )

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Response:
        """Whether it takes requests: not while it drains."""
        word = "ready" if service.ready() else "draining" if service.alive() else "dead"
        return JSONResponse({"status": word}, 200 if word == "ready" else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        """For Prometheus."""
        text = service.metrics.text(service.figures(), model=service.base, version=service.version)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model, and each adapter as a model of its own."""
        return {"object": "list", "data": [service.described(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        service.adapter_of(name)
        return service.described(name)


def _asking(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await Chat(service, await _body(request, ChatRequest)).respond(request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Go on with a text."""
        return await Completions(service, await _body(request, CompletionRequest)).respond(request)


async def _body(request: Request, model: type[M]) -> M:
    try:
        data = json.loads(await request.body(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "msg", str(error))
        raise ApiError(400, f"the body is no JSON ({reason:.100})", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can say it, no tokenizer takes it
        raise ApiError(
            400, "the body holds half of a surrogate pair, which is no character", code="invalid_json"
        ) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise of_validation(error) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        known = {404: f"{what}: no such path", 405: f"{what}: this path does not take that method"}
        told = ApiError(error.status_code, known.get(error.status_code, str(error.detail)))
        return JSONResponse(told.body(), told.status, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        told = ApiError(500, f"unexpected {type(error).__name__}; the job's log has more")
        return JSONResponse(told.body(), told.status)


class _Counted:
    """Counts every answer by its path and status."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request (ASGI 3)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.answered(path, message["status"])
            await send(message)

        await self._app(scope, receive, counting)
