"""Who may do what: API keys in `Authorization: Bearer`, and, before the first key is made, this machine's own requests alone, or none.

It stands before the routes, so that nobody's body is read, and nobody learns which jobs exist, before the key was looked at.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.batches import Batches
from service.errors import database_problem, problem_response
from service.store.keys import ApiKey, KeyScope, any_keys, find_keys, mark_used, stale_keys
from service.store.session import reading

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Need no key: what asks whether the service lives has none, and learns nothing else."""

STILL_ALLOWED = "still_allowed"
"""Of a request's state: a function that looks again whether the request may pass, for answers that take long."""

_LEVELS = {scope: level for level, scope in enumerate(KeyScope)}
_MAKE_ONE = (
    "make one where the service runs (on its machine, in its container) with `cliprd keys create --scope SCOPE --name NAME`,"
    " and send it as `Authorization: Bearer KEY` (CLIPRD_API_KEY)"
)


@dataclass(frozen=True)
class Refusal:
    """Why a request may not pass."""

    status: int
    detail: str
    challenge: str = "Bearer"
    """`WWW-Authenticate` (RFC 6750, section 3)."""


class Look(NamedTuple):
    """What the look at a request's key found."""

    refusal: Refusal | None
    """Why the request may not pass; None: it may."""
    stale_key_id: str | None = None
    """The key, if its time of last use should be written again."""


class Authorization:
    """Middleware that lets a request pass, or answers it with 401 or 403.

    Args:
        app: What stands behind it.
        sessions: The database of the keys.
        open_paths: Paths that need no key.
        always: Also before there is any key: this machine's own requests are refused like all others.
    """

    def __init__(
        self, app: ASGIApp, sessions: sessionmaker[Session], *, open_paths: frozenset[str] = OPEN_PATHS, always: bool = False
    ) -> None:
        self.app = app
        self._sessions = sessions
        self._open_paths = open_paths
        self._always = always
        self._has_keys = False  # once there is a key, there always is
        self._looks = Batches(self._look_at)
        self._uses = Batches(self._mark_used)  # apart, so that a look, which all requests wait for, never waits for a writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _route_path(scope) in self._open_paths:
            await self.app(scope, receive, send)
            return
        try:
            refusal = await self._refusal_now(scope)
        except SQLAlchemyError as error:
            await database_problem(scope["method"], scope["path"], error)(scope, receive, send)
            return

        async def still_allowed() -> bool:
            return await self._refusal_now(scope) is None

        if refusal is None:
            scope.setdefault("state", {})[STILL_ALLOWED] = still_allowed
            await self.app(scope, receive, send)
        else:
            await _answer(scope, refusal)(scope, receive, send)

    async def _refusal_now(self, scope: Scope) -> Refusal | None:
        """
        Raises:
            SQLAlchemyError: the database can't tell.
        """
        refusal, stale_key_id = await self._looks.do(scope)
        if stale_key_id is not None:
            await self._uses.do(stale_key_id)
        return refusal

    def _look_at(self, scopes: Sequence[Scope]) -> list[Look]:
        given = [_given_key(scope) for scope in scopes]
        with reading(self._sessions) as session:
            has_keys = self._has_keys or any_keys(session=session)
            found = find_keys(session=session, keys={key for key in given if key}) if has_keys else {}
            stale = stale_keys(session=session, keys=found.values())
        if not has_keys:
            return [Look(self._refusal_without_keys(scope)) for scope in scopes]
        self._has_keys = True
        return [self._look(scope, key, found.get(key), stale) for scope, key in zip(scopes, given, strict=True)]

    def _look(self, scope: Scope, key: str, found: ApiKey | None, stale: Collection[str]) -> Look:
        return Look(self._refusal(scope, key, found), found.id if found is not None and found.id in stale else None)

    def _refusal_without_keys(self, scope: Scope) -> Refusal | None:
        return Refusal(401, f"no API key has been made yet; {_MAKE_ONE}") if self._always else _refusal_of_others(scope)

    def _refusal(self, scope: Scope, key: str, found: ApiKey | None) -> Refusal | None:
        if not key:
            return Refusal(401, f"this needs an API key; {_MAKE_ONE}")
        if found is None:
            return Refusal(401, f"there is no such API key, or it was revoked; {_MAKE_ONE}", 'Bearer error="invalid_token"')
        needed = needed_scope(scope["method"])
        if _LEVELS[found.scope] >= _LEVELS[needed]:
            return None
        detail = f"this needs an API key of scope `{needed}`, but `{found.name}` has `{found.scope}`; use one that has it"
        return Refusal(403, detail, f'Bearer error="insufficient_scope", scope="{needed}"')

    def _mark_used(self, key_ids: Sequence[str]) -> list[None]:
        """A database too busy for this is no reason to refuse the requests."""
        distinct = sorted(set(key_ids))
        try:
            with self._sessions.begin() as session:
                mark_used(session=session, key_ids=distinct)
        except SQLAlchemyError as error:
            logger.warning("the use of API keys %s was not recorded: %s", ", ".join(distinct), error)
        return [None] * len(key_ids)


def needed_scope(method: str) -> KeyScope:
    """The scope that a request of this method needs."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return KeyScope.READ
    return KeyScope.ADMIN if method == "DELETE" else KeyScope.SUBMIT


def is_loopback(host: str) -> bool:
    """Whether a host's name or address, without port, is this machine's own."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _given_key(scope: Scope) -> str:
    """The key of a request; empty if it has none."""
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _refusal_of_others(scope: Scope) -> Refusal | None:
    """Client, `Host` and `Origin` must all be this machine: a page on the internet can make a browser here send requests to names that
    resolve to 127.0.0.1 (DNS rebinding), and to 127.0.0.1 itself."""
    headers = Headers(scope=scope)
    client = scope.get("client")
    given = {"Host": _host_of(f"//{headers.get('host', '')}")}
    if client is not None:  # a Unix socket has none
        given["client"] = client[0]
    if "origin" in headers:
        given["Origin"] = _host_of(headers["origin"])
    for name, host in given.items():
        if not is_loopback(host):
            detail = f"no API key has been made yet, so only this machine's own requests are served, and the {name} is {host[:200]!r}"
            return Refusal(403, f"{detail}; {_MAKE_ONE}")
    return None


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _route_path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _answer(scope: Scope, refusal: Refusal) -> Response:
    return problem_response(scope["path"], refusal.status, refusal.detail, headers={"WWW-Authenticate": refusal.challenge})
