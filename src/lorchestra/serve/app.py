"""The HTTP side: OpenAI's routes in front of a gateway."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorchestra.errors import LorchestraError
from lorchestra.serve.engine import Chunk, Usage
from lorchestra.serve.ports import Caller, Gateway, UnauthenticatedError, UnknownModelError
from lorchestra.serve.responses import Heading, Refused, Said, answered_by, model, refused, told
from lorchestra.serve.sse import DONE, ClientGoneError, EventStream, close, event, while_connected
from lorchestra.serve.wire import ChatRequest, CompletionRequest, FeedbackRequest, LoadRequest, UnloadRequest, read

_log = logging.getLogger("lorchestra.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class HttpSettings:
    """What the HTTP side may be told.

    Args:
        runtime_adapters: whether vLLM's load and unload routes are there.
        cors_origins: of browsers that may read the answers; none by default.
        max_body: bytes of a request.
        body_seconds: in which a request has to be here.
        registry: whether the routes are there that need one: feedback, and its state for operators.
    """

    runtime_adapters: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body: int = 8 * 2**20
    body_seconds: float = 60.0
    registry: bool = False


def create_app(
    gateway: Gateway,
    settings: HttpSettings = HttpSettings(),
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """OpenAI's API on ``gateway``.

    Args:
        gateway: what answers.
        settings: see :class:`HttpSettings`.
        lifespan: brings the gateway's engine up and down with the server.
    """
    app = FastAPI(title="lorchestra", docs_url=None, redoc_url=None, lifespan=lifespan)
    _answers(app, gateway, settings)
    _models(app, gateway)
    _operation(app, gateway)
    if settings.runtime_adapters:
        _runtime_adapters(app, gateway, settings)
    if settings.registry:
        _registry(app, gateway, settings)
    _errors(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=[
                "x-request-id",
                "retry-after",
                "x-lorchestra-model",
                "x-lorchestra-arm",
                "x-lorchestra-coefficients",
            ],
        )
    app.add_middleware(Requests)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


class Requests:
    """Every request has an id, which is told back (the client's ``x-request-id`` where it is a plain one), and an
    answer, whatever fails.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        began = lost = False

        async def with_id(message: Message) -> None:
            nonlocal began, lost
            if message["type"] == "http.response.start":
                began = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            try:
                await send(message)
            except Exception:
                lost = True
                raise

        try:
            await self._app(scope, receive, with_id)
        except Exception as error:
            if lost:  # uvicorn has refused what came after the request's head, and is ending the connection
                await _disconnected(receive)
                return
            said = _said(error, request_id)
            if began:
                raise  # too late to say so: the connection is cut
            await _response(said)(scope, receive, with_id)


async def _disconnected(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(5):
            while (await receive())["type"] != "http.disconnect":
                pass


def _answers(app: FastAPI, gateway: Gateway, settings: HttpSettings) -> None:
    async def answered(request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
        caller = _caller(request, gateway)
        body = await _body(request, kind, settings)
        heading = Heading(body, request.state.request_id, int(time.time()))
        if not body.stream:
            answer = await while_connected(request, gateway.answer(caller, heading.request_id, body))
            return JSONResponse(heading.whole(answer), headers=answered_by(answer.by))
        parts = gateway.stream(caller, heading.request_id, body)
        try:
            first = await while_connected(request, anext(parts, None))  # what can be refused is refused here
        except BaseException:
            await close(parts)
            raise
        stream = EventStream(_events(heading, first, parts), parts)
        stream.headers.update(answered_by(first.by if first else None))
        return stream

    @app.post("/v1/completions", **_documented(CompletionRequest, "Continue texts."))
    async def completions(request: Request) -> Response:
        return await answered(request, CompletionRequest)

    @app.post("/v1/chat/completions", **_documented(ChatRequest, "Answer in a conversation."))
    async def chat_completions(request: Request) -> Response:
        return await answered(request, ChatRequest)


async def _events(heading: Heading, first: Chunk | None, parts: AsyncIterator[Chunk]) -> AsyncIterator[bytes]:
    """The stream's events; a failure on the way is one too, since the status is long sent."""
    total = Usage(0, 0)
    chunk = first
    try:
        while chunk is not None:
            total = chunk.usage
            yield event(heading.part(chunk))
            chunk = await anext(parts, None)
        options = heading.request.stream_options
        if options is not None and options.include_usage:
            yield event(heading.account(total))
    except Exception as error:  # whatever it is, the client hears that this answer is not whole
        yield event(_said(error, heading.request_id).body.model_dump())
    finally:
        await close(parts)
    yield DONE


def _models(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models", **_documented(None, "The models of this key."))
    async def models(request: Request) -> Response:
        cards = gateway.models(_caller(request, gateway))
        return JSONResponse({"object": "list", "data": [model(card) for card in cards]})

    @app.get("/v1/models/{model_id:path}", **_documented(None, "One of them."))
    async def one_model(request: Request, model_id: str) -> Response:
        for card in gateway.models(_caller(request, gateway)):
            if card.id == model_id:
                return JSONResponse(model(card))
        raise UnknownModelError(f"there is no model {model_id!r} for this key; GET /v1/models lists them", model_id)


def _operation(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", **_documented(None, "The process answers."))
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", **_documented(None, "It takes requests."))
    async def ready() -> Response:
        stale = {} if gateway.registry_stale is None else {"registry_stale_seconds": round(gateway.registry_stale, 1)}
        if gateway.ready:
            return JSONResponse({"status": "ready"} | stale)
        if stale:
            why = f"the registry has not been seen for {stale['registry_stale_seconds']:,} seconds"
            return _response(refused(503, why, code="registry_stale"))
        return _response(refused(503, "the server is starting or stopping", code="unavailable"))

    @app.get("/metrics", **_documented(None, "Prometheus' metrics, for operators."))
    async def metrics(request: Request) -> Response:
        content = gateway.metrics(_caller(request, gateway))
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


def _runtime_adapters(app: FastAPI, gateway: Gateway, settings: HttpSettings) -> None:
    @app.post("/v1/load_lora_adapter", **_documented(LoadRequest, "Serve another adapter."))
    async def load(request: Request) -> Response:
        caller = _caller(request, gateway)
        body = await _body(request, LoadRequest, settings)
        with _logged(request, gateway, caller, "load", body.lora_name):
            await gateway.load(caller, body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", **_documented(UnloadRequest, "Serve an adapter no longer."))
    async def unload(request: Request) -> Response:
        caller = _caller(request, gateway)
        body = await _body(request, UnloadRequest, settings)
        with _logged(request, gateway, caller, "unload", body.lora_name):
            await gateway.unload(caller, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@contextmanager
def _logged(request: Request, gateway: Gateway, caller: Caller, kind: str, name: str) -> Iterator[None]:
    """Who changed what is served, or was not let, is in the request log."""
    began, status = time.monotonic(), 499  # the client left
    try:
        yield
        status = 200
    except Exception as error:
        said = told(error)
        status = said.status if said else 500
        raise
    finally:
        seconds = time.monotonic() - began
        gateway.told(kind, request.state.request_id, caller.tenant, status, model=name, seconds=seconds)


def _registry(app: FastAPI, gateway: Gateway, settings: HttpSettings) -> None:
    def known(request: Request, kind: str) -> Caller:
        """Who asks; that nobody may is logged here, where the request is no question to a model."""
        try:
            return _caller(request, gateway)
        except UnauthenticatedError:
            gateway.told(kind, request.state.request_id, None, 401)
            raise

    @app.post("/v1/feedback", **_documented(FeedbackRequest, "Judge an answer.", 422))
    async def feedback(request: Request) -> Response:
        caller = known(request, "feedback")
        body = await _body(request, FeedbackRequest, settings)
        await gateway.feedback(caller, request.state.request_id, body)
        return JSONResponse({"object": "feedback", "request_id": body.request_id})

    @app.get("/admin/registry", **_documented(None, "The registry that is followed, for operators."))
    async def state(request: Request) -> Response:
        caller = known(request, "admin")
        status = 403
        try:
            report = gateway.registry(caller)
            status = 200
        finally:
            gateway.told("admin", request.state.request_id, caller.tenant, status, path=request.url.path)
        return JSONResponse(report)


def _caller(request: Request, gateway: Gateway) -> Caller:
    return gateway.authenticate(request.headers.get("authorization"))


async def _body(request: Request, kind: type[R], settings: HttpSettings) -> R:
    """The request's JSON, checked. Its size and its sender's patience are bounded."""
    sort = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sort != "application/json":
        raise HTTPException(415, f"the content type is {sort!r}; send JSON with 'Content-Type: application/json'")
    too_large = HTTPException(413, f"the request has more than {settings.max_body:,} bytes; send less at once")
    content = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                content += part
                if len(content) > settings.max_body:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"the request was not here after {settings.body_seconds:g} seconds") from error
    return read(kind, bytes(content))


def _errors(app: FastAPI) -> None:
    async def explained(request: Request, error: Exception) -> Response:
        return _response(_said(error, request.state.request_id))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the log has it

    async def wrong(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = refused(error.status_code, _plainly(request, error))
        return _response(said, error.headers or {})

    app.add_exception_handler(LorchestraError, explained)
    app.add_exception_handler(ClientGoneError, gone)
    app.add_exception_handler(HTTPException, wrong)


def _plainly(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is no {request.url.path!r} here; the API is under /v1"
    if error.status_code == 405:
        return f"{request.url.path!r} is not for {request.method}; allowed: {(error.headers or {}).get('Allow', '')}"
    return str(error.detail)


def _said(error: Exception, request_id: str) -> Said:
    """What the client hears; of a failure of the server's own, the request id alone: the log has the rest."""
    said = told(error)
    if said is None:
        _log.error("request %s failed", request_id, exc_info=error)
        said = refused(500, f"the server failed; its log has the reason under request id {request_id}", code="internal")
    return said


def _response(said: Said, headers: Mapping[str, str] = {}) -> Response:
    extra = dict(headers)
    if said.retry_after is not None:
        extra["retry-after"] = str(max(1, -int(-said.retry_after // 1)))
    if said.status == 401:
        extra["www-authenticate"] = "Bearer"
    return JSONResponse(said.body.model_dump(), said.status, extra)


_REFUSALS = (400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503)


def _documented(kind: type[BaseModel] | None, summary: str, *more: int) -> dict[str, Any]:
    """What the OpenAPI schema says of a route whose body is read here and not by FastAPI; it may refuse by ``more``."""
    route: dict[str, Any] = {
        "summary": summary,
        "response_model": None,
        "responses": {status: {"model": Refused, "description": "Refused"} for status in (*_REFUSALS, *more)},
    }
    if kind is not None:
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        route["openapi_extra"] = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        }
    return route


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema, with the requests that FastAPI does not see."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        kinds: tuple[type[BaseModel], ...] = (
            CompletionRequest,
            ChatRequest,
            LoadRequest,
            UnloadRequest,
            FeedbackRequest,
        )
        for kind in kinds:
            own = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            known.update(own.pop("$defs", {}))
            known[kind.__name__] = own
        app.openapi_schema = schema
    return app.openapi_schema
