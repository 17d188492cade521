"""What stands between server and routes: limits on requests, one shape for errors no handler sees, HEAD, headers for browsers."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_response


class RequestLimits:
    """Refuses a request of a long URL or long header fields (431), and one of a long body (413), whether its length is announced or not.

    Args:
        app: What stands behind it.
        max_body_bytes: Of the body.
        max_header_bytes: Of the URL's path and query and all header fields together.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_header_bytes: int) -> None:
        self.app = app
        self._max_body_bytes = max_body_bytes
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        num_header_bytes = sum(len(name) + len(value) for name, value in headers.raw)
        if len(scope["raw_path"]) + len(scope["query_string"]) + num_header_bytes > self._max_header_bytes:
            detail = f"the URL and the header fields are longer than {self._max_header_bytes} bytes together"
            await problem_response(scope["path"][:80], 431, detail, headers={"Connection": "close"})(scope, receive, send)
            return
        detail = f"the request body is longer than {self._max_body_bytes} bytes"
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
            await problem_response(scope["path"], 413, detail, headers={"Connection": "close"})(scope, receive, send)
            return
        num_received, is_answered = 0, False

        async def counted() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_body_bytes:
                if is_answered:  # a stream, which only listens for the client's going: it ends
                    return {"type": "http.disconnect"}
                raise HTTPException(413, detail, headers={"Connection": "close"})
            return message

        async def noting(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        await self.app(scope, counted, noting)


class ProblemsOnly:
    """Turns an error that the framework answers in plain text, such as a range outside the file, into a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        replaced: Message | None = None
        text = b""

        async def converting(message: Message) -> None:
            nonlocal replaced, text
            if message["type"] == "http.response.start" and message["status"] >= 400:
                if Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain"):
                    replaced = message
                    return
            elif replaced is not None and message["type"] == "http.response.body":
                text += message.get("body", b"")
                if not message.get("more_body", False):
                    headers = {key: value for key, value in Headers(raw=replaced["headers"]).items() if not key.startswith("content-")}
                    if "content-range" in Headers(raw=replaced["headers"]):
                        headers["content-range"] = Headers(raw=replaced["headers"])["content-range"]
                    detail = text.decode(errors="replace") or "the request can't be answered"
                    await problem_response(scope["path"], replaced["status"], detail, headers=headers)(scope, receive, send)
                return
            await send(message)

        await self.app(scope, receive, converting)


class HeadLikeGet:
    """Answers HEAD as GET without the body (RFC 9110, section 9.3.2), where a route has GET alone. Streams are ended after their header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        if _has_route(scope) or not _has_route(as_get):
            await self.app(scope, receive, send)
            return
        is_answered = False

        async def without_body(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                await send(message)
            elif not is_answered:
                is_answered = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await self.app(as_get, receive, without_body)
        finally:
            scope["route"] = as_get.get("route")  # for the measurements, which know the request as HEAD


def _has_route(scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


class SecurityHeaders:
    """Tells browsers to take every answer for what it says it is, and to run or frame nothing, where a route doesn't say otherwise."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        await self.app(scope, receive, adding)
