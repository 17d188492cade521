"""A small HTTP server for tests of remote shards: it counts what it is asked, and misbehaves on demand."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class FileServer:
    """Serves the files of a folder."""

    folder: Path
    url: str = ""
    num_asked: Counter[tuple[str, str]] = field(default_factory=Counter)  # by method and path
    failures_left: int = 0  # this many GETs answer 503
    cut_at: int | None = None  # bytes after which the connection breaks
    answers_get_after_seconds: float = 0.0
    sends_before: bytes = b""  # a GET's content begins with so much that no HEAD has told of
    headers_of_get: dict[str, str] = field(default_factory=dict)
    encodings_asked_for: set[str] = field(default_factory=set)
    redirects: dict[str, str] = field(default_factory=dict)  # from paths to URLs

    def num_downloads(self, name: str) -> int:
        return self.num_asked["GET", f"/{name}"]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            server.num_asked[self.command, self.path] += 1
            file = server.folder / self.path.lstrip("/")
            if self.path in server.redirects:
                self.send_response(302)
                self.send_header("Location", server.redirects[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if with_body:
                time.sleep(server.answers_get_after_seconds)
            if with_body and server.failures_left > 0:
                server.failures_left -= 1
                self.send_error(503)
                return
            if not file.is_file():
                self.send_error(404)
                return
            content = file.read_bytes()
            server.encodings_asked_for.add(self.headers.get("Accept-Encoding", ""))
            self.send_response(200)
            if with_body and server.sends_before:  # its length is told by the end of the connection
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(content)))
            for name, value in server.headers_of_get.items() if with_body else ():
                self.send_header(name, value)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:16]}"')
            self.end_headers()
            if with_body:
                with contextlib.suppress(ConnectionError):  # whoever has enough hangs up
                    self.wfile.write(server.sends_before + content[: server.cut_at])
            if server.cut_at is not None:
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
