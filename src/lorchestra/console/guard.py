"""What stands before every route of the console: where a request comes from, whose it is, and what that one may.

A change needs four things, each of which is refused for itself and logged: a host that is ours, an origin that is this
page, a session, and the token of that session. What a route asks for is in its entry of the table (:class:`Route`);
there is no way around it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from lorchestra.errors import LorchestraError
from lorchestra.registry.mistakes import PromotionRefused, RegistryError, RevokedError, UnknownReferenceError
from lorchestra.serve.engine import OverloadedError, RequestError, UnprocessableError
from lorchestra.serve.gateway import KnownCaller
from lorchestra.serve.ports import ForbiddenError, UnauthenticatedError
from lorchestra.serve.responses import Said, refused, told
from lorchestra.serve.sse import ClientGoneError
from lorchestra.serve.wire import read

if TYPE_CHECKING:
    from lorchestra.console.sessions import Session, Sessions
    from lorchestra.registry.access import Key
    from lorchestra.serve.gateway import TenantGateway

Access = Literal["open", "viewer", "operator"]
TOKEN, POLL = "x-lorchestra-csrf", "x-lorchestra-poll"
MOST_BODY, BODY_SECONDS = 1 << 20, 30.0
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_log = logging.getLogger("lorchestra.console")
B = TypeVar("B", bound=BaseModel)


class ForgedError(ForbiddenError):
    """A change that this page did not ask for: HTTP 403."""


class NotHereError(LorchestraError):
    """There is nothing under that address: HTTP 404."""


@dataclass(frozen=True)
class Asked:
    """A request that may be answered.

    Args:
        request: it.
        session: whose; ``None`` on an open route.
        key: of the session, as it is now.
    """

    request: Request
    session: Session | None
    key: Key | None

    @property
    def caller(self) -> KnownCaller:
        """For the gateway."""
        assert self.key is not None  # only open routes have none
        return KnownCaller(self.key.name, self.key)

    @property
    def request_id(self) -> str:
        """Of this request."""
        return str(self.request.state.request_id)

    def text(self, name: str, longest: int = 512) -> str:
        """A text of the query; empty if it is not there."""
        value = self.request.query_params.get(name, "")
        if len(value) > longest or "\0" in value:
            raise RequestError(f"{name} has at most {longest} characters and no NUL", name)
        return value

    def number(self, name: str, default: int, most: int) -> int:
        """A whole number of the query."""
        value = self.request.query_params.get(name, str(default))
        if not (value.isascii() and value.isdigit()) or len(value) > 12 or int(value) > most:
            raise RequestError(f"{name} is a whole number from 0 to {most:,}, not {value[:20]!r}", name)
        return int(value)

    async def body(self, kind: type[B]) -> B:
        """The request's JSON, checked.

        Raises:
            RequestError: it is too long or too slow, no JSON, or not of that kind.
        """
        sort = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sort != "application/json":
            raise RequestError(f"the content type is {sort!r}; send JSON with 'Content-Type: application/json'")
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in self.request.stream():
                    content += part
                    if len(content) > MOST_BODY:
                        raise RequestError(f"the request has more than {MOST_BODY:,} bytes; send less")
        except TimeoutError as error:
            raise RequestError(f"the request was not here after {BODY_SECONDS:g} seconds") from error
        return read(kind, bytes(content))


Handler = Callable[[Asked], Awaitable[Mapping[str, Any] | Response]]


@dataclass(frozen=True)
class Route:
    """One of the console's routes.

    Args:
        method: ``GET`` changes nothing; everything else needs origin and token.
        path: below ``/console``.
        access: ``open`` to everybody, or the least role.
        answer: what it does.
    """

    method: Literal["GET", "POST"]
    path: str
    access: Access
    answer: Handler

    @property
    def changes(self) -> bool:
        """Whether it may change anything."""
        return self.method != "GET"


class Guard:
    """Lets through what may, and says and logs what may not.

    Args:
        sessions: of the console.
        gateway: logs.
        keyed: whether the server has keys. Without, whoever reaches it may do everything, so that its name must be one
            that no page elsewhere can take for its own: this machine's, or an address (DNS rebinding).
    """

    def __init__(self, sessions: Sessions, gateway: TenantGateway, *, keyed: bool) -> None:
        self._sessions, self._gateway, self._keyed = sessions, gateway, keyed

    def of(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of a route."""

        async def endpoint(request: Request) -> Response:
            status, tenant = 500, None
            try:
                asked = self._asked(request, route)
                tenant = asked.key.name if asked.key else None
                answer = await route.answer(asked)
                response = answer if isinstance(answer, Response) else JSONResponse(dict(answer))
                status = response.status_code
            except ClientGoneError:
                status = 499
                return Response(status_code=499)
            except Exception as error:  # whatever it is: it is answered here, with the headers of this page
                response = failed(error, request.state.request_id)
                status = response.status_code
            finally:
                if route.changes or status in (401, 403):
                    self._gateway.told(
                        "console", request.state.request_id, tenant, status, method=route.method, path=request.url.path
                    )
            response.headers.setdefault("cache-control", "no-store")
            return response

        return endpoint

    def _asked(self, request: Request, route: Route) -> Asked:
        self._check_host(request)
        if route.changes:
            _check_origin(request)
        found = self._sessions.find(request.cookies.get(cookie_name(request), ""), by_itself=POLL in request.headers)
        if found is None:
            if route.access != "open":
                raise UnauthenticatedError("nobody is logged in, or the session is over; log in again")
            return Asked(request, None, None)
        session, key = found
        if route.access == "open":
            return Asked(request, session, key)
        if route.changes and not session.shows(request.headers.get(TOKEN, "")):
            raise ForgedError(f"this change did not come from the console's page: the header {TOKEN} is not its token")
        if route.access == "operator" and not key.operates:
            raise ForbiddenError(f"the key of {key.name} has the role {key.role!r}: it may look, and change nothing")
        return Asked(request, session, key)

    def _check_host(self, request: Request) -> None:
        host = (urlsplit(f"//{request.headers.get('host', '')}").hostname or "").lower()
        if self._keyed or host == "localhost":
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ForgedError(
                f"a server without keys has no console under the name {host[:80]!r}: reach it by its address or as "
                "localhost, or give it keys (`lorchestra serve keys add NAME --role operator`)"
            ) from None


def cookie_name(request: Request) -> str:
    """Of the session's cookie; the prefix makes browsers hold it to this host and to TLS."""
    return "__Host-lorchestra-console" if request.url.scheme == "https" else "lorchestra-console"


def _check_origin(request: Request) -> None:
    """A browser says from which page a change comes; it has to be ours. It says https where TLS ends before us."""
    origin, host = request.headers.get("origin", ""), request.headers.get("host", "")
    allowed = {f"{request.url.scheme}://{host}", f"https://{host}"}
    if not host or origin not in allowed or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise ForgedError(f"this change did not come from the console's page: its origin is {origin[:200]!r}")


def failed(error: Exception, request_id: str) -> Response:
    """How an error is told to the page."""
    said = _said(error)
    if said is None:
        _log.error("request %s failed", request_id, exc_info=error)
        said = refused(500, f"the server failed; its log has the reason under request id {request_id}", code="internal")
    headers = {} if said.retry_after is None else {"retry-after": str(max(1, -int(-said.retry_after // 1)))}
    return JSONResponse(said.body.model_dump(), said.status, headers)


def _said(error: Exception) -> Said | None:
    message = str(error)
    match error:
        case ForgedError():
            return refused(403, message, code="forged")
        case NotHereError():
            return refused(404, message, code="not_found")
        case UnknownReferenceError():
            return refused(404, message, code="unknown_version")
        case RevokedError():
            return refused(409, message, code="revoked")
        case PromotionRefused():
            return refused(409, message, code="gates")
        case RegistryError():
            return refused(503, message, code="registry")
        case OverloadedError() | RequestError() | UnprocessableError() | UnauthenticatedError():
            return told(error)
    return told(error)


class Sealed:
    """Every answer below ``/console`` has the headers that a page of rank needs, whatever it is."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self._app(scope, receive, sealed if scope["type"] == "http" else send)
