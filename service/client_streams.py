"""A server-sent stream as the Python client follows it: over restarts of the service, without gap or repeat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import httpx

RECONNECT_SECONDS = 1.0


class Sent(NamedTuple):
    """One event of a stream."""

    id: str
    kind: str
    data: str


def follow(
    http: httpx.Client, path: str, params: Mapping[str, int], *, patience_seconds: float, error_of: Callable[[httpx.Response], Exception]
) -> Iterator[Sent]:
    """The stream's events, until the one that ends it.

    Args:
        http: The service's.
        path: Of the stream.
        params: Of its query, the first time; after that its place is told by `Last-Event-ID`.
        patience_seconds: How long a service is waited for that was there before.
        error_of: What to raise for a refusal.

    Raises:
        httpx.TransportError: the service was never there, or has been away for too long.
    """
    last_id, last_seen = "", float("-inf")
    while True:
        try:
            for one in _events(http, path, params, last_id, error_of):
                last_id, last_seen = one.id or last_id, time.monotonic()
                if one.kind == "end":
                    return
                yield one
        except httpx.TransportError:
            if time.monotonic() - last_seen > patience_seconds:
                raise
        time.sleep(RECONNECT_SECONDS)


def _events(
    http: httpx.Client, path: str, params: Mapping[str, int], last_id: str, error_of: Callable[[httpx.Response], Exception]
) -> Iterator[Sent]:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
    with http.stream("GET", path, params={} if last_id else params, headers=headers) as response:
        if response.is_error:
            response.read()
            raise error_of(response)
        if response.status_code == httpx.codes.NO_CONTENT:  # nothing came after that place, and nothing will
            yield Sent("", "end", "")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            name, _, value = line.partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
            elif not line and "data" in fields:
                yield Sent(fields.get("id", ""), fields.get("event", "message"), fields["data"])
                fields = {}
