"""The console, put together and mounted on a server's app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount
from starlette.routing import Route as Endpoint

from lorchestra.console import pages
from lorchestra.console.changing import Changing
from lorchestra.console.guard import HEADERS, Asked, Guard, Route, Sealed, cookie_name
from lorchestra.console.looking import Looking, Threads
from lorchestra.console.playground import Playground
from lorchestra.console.sessions import LONGEST, Attempts, KeyRing, Session, Sessions
from lorchestra.registry.access import OPEN, Key
from lorchestra.serve.engine import OverloadedError
from lorchestra.serve.ports import ForbiddenError, UnauthenticatedError
from lorchestra.serve.responses import refused

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lorchestra.console.usage import Usage
    from lorchestra.serve.following import Follower
    from lorchestra.serve.gateway import TenantGateway

PREFIX = "/console"


class Login(BaseModel):
    """A key."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(min_length=1, max_length=512, repr=False)]


class Console:
    """Everything that the console needs of a server.

    Args:
        gateway: answers questions and keeps the request log.
        keys: who may log in; ``None``: nobody has to.
        usage: is shown.
        base: what the base is called.
        follower: of the registry; ``None`` where the server has none.
        sessions: of browsers; new ones unless given.
        attempts: to log in; new ones unless given.
    """

    def __init__(
        self,
        gateway: TenantGateway,
        keys: KeyRing | None,
        usage: Usage,
        base: str,
        follower: Follower | None = None,
        sessions: Sessions | None = None,
        attempts: Attempts | None = None,
    ) -> None:
        self._keys, self._usage, self._base, self._follower = keys, usage, base, follower
        self.sessions = sessions or Sessions(keys)
        self._attempts = attempts or Attempts()
        threads = Threads()
        looking = Looking(follower, threads)
        parts = (looking, Changing(looking, follower, threads), Playground(gateway))
        self.routes: list[Route] = [
            Route("GET", "/api/session", "open", self._session),
            Route("POST", "/api/login", "open", self._login),
            Route("POST", "/api/logout", "viewer", self._logout),
            Route("GET", "/api/usage", "viewer", self._used),
            *(route for part in parts for route in part.routes),
        ]
        self._guard = Guard(self.sessions, gateway, keyed=keys is not None)

    def app(self) -> Starlette:
        """Page, assets and routes, below the prefix."""
        endpoints = [Endpoint(route.path, self._guard.of(route), methods=[route.method]) for route in self.routes]
        app = Starlette(
            routes=[Endpoint("/", pages.index), Endpoint("/assets/{version}/{name}", pages.asset), *endpoints],
            exception_handlers={HTTPException: _wrong},
        )
        app.router.redirect_slashes = False
        return app

    async def _session(self, asked: Asked) -> Response:
        """Who is logged in. Where nobody has to, this begins a session: changes need its token all the same."""
        if asked.session is not None and asked.key is not None:
            return JSONResponse(self._told(asked.session, asked.key))
        if self._keys is not None:
            raise UnauthenticatedError("nobody is logged in")
        return self._began(asked.request, OPEN)

    async def _login(self, asked: Asked) -> Response:
        said = await asked.body(Login)
        address = asked.request.client.host if asked.request.client else ""
        wait = self._attempts.take(address)
        if wait:
            raise OverloadedError("too many tries to log in from this address; wait a moment", wait)
        key = self._keys.find(said.key.strip()) if self._keys is not None else OPEN
        if key is None:
            raise UnauthenticatedError("this is no key of this server, or one that was revoked")
        if not key.views:
            raise ForbiddenError(
                f"the key of {key.name} has the role {key.role!r}; the console is for viewers and operators "
                f"(`lorchestra serve keys add NAME --role viewer`)"
            )
        self._attempts.forgive(address)
        self.sessions.end(asked.request.cookies.get(cookie_name(asked.request), ""))
        return self._began(asked.request, key)

    async def _logout(self, asked: Asked) -> Response:
        name = cookie_name(asked.request)
        self.sessions.end(asked.request.cookies.get(name, ""))
        response = JSONResponse({"logged_out": True})
        response.delete_cookie(name, path="/", secure=asked.request.url.scheme == "https", httponly=True)
        return response

    async def _used(self, asked: Asked) -> Mapping[str, Any]:
        return self._usage.report()

    def _began(self, request: Request, key: Key) -> Response:
        id, session = self.sessions.begin(key)
        response = JSONResponse(self._told(session, key))
        response.set_cookie(
            cookie_name(request), id, max_age=int(LONGEST), path="/", secure=request.url.scheme == "https",
            httponly=True, samesite="strict",
        )  # fmt: skip
        return response

    def _told(self, session: Session, key: Key) -> dict[str, Any]:
        return {
            "name": key.name,
            "role": key.role,
            "csrf": session.csrf,
            "login": self._keys is not None,
            "base": self._base,
            "registry": self._follower.registry.location.shown if self._follower else None,
        }


def mount(app: FastAPI, console: Console) -> None:
    """Serve the console at ``/console`` of a server's app."""
    app.router.routes.append(Endpoint(PREFIX, _home))
    app.router.routes.append(Mount(PREFIX, Sealed(console.app())))


async def _home(request: Request) -> Response:
    return RedirectResponse("console/", 308, HEADERS)


async def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "there is nothing here" if error.status_code == 404 else str(error.detail)
    return JSONResponse(refused(error.status_code, message).body.model_dump(), error.status_code)
