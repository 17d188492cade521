"""The HTTP client that fetches shards: it goes only where a job may read from, also when a server redirects it.

Every request is looked at, the first one and those that follow a redirect, and every name once more when it is resolved: the addresses
that are looked at are those that are then connected to, so that a name can't change its meaning in between (DNS rebinding).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from cliprd_core.locations import Locations


@dataclass(frozen=True)
class ClientFactory:
    """Makes sessions for the URLs of one server; what fsspec takes as `get_client`."""

    origin: str
    """Scheme, host and port of the server, which a job may read from."""
    allowed: Locations

    async def __call__(self, **options: Any) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=_Resolver(self))
        return aiohttp.ClientSession(connector=connector, middlewares=[self._check_request], **options)

    async def _check_request(self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        self.allowed.check_redirect(self.origin, str(request.url))
        return await handler(request)


class _Resolver(AbstractResolver):
    """The system's resolver, whose answers are looked at."""

    def __init__(self, factory: ClientFactory) -> None:
        self._factory = factory
        self._system = aiohttp.ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._system.resolve(host, port, family)
        self._factory.allowed.check_redirect(self._factory.origin, f"http://{host}:{port}", [one["host"] for one in found])
        return found

    async def close(self) -> None:
        await self._system.close()
