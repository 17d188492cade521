"""`python -m service.ready`, the API container's health check."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from service.ready import main


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """A server that answers every request in this way; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


PROBLEM = json.dumps({"errors": [{"field": "broker", "problem": "refused", "remedy": "Look."}, {"field": "database", "problem": "gone"}]})


@pytest.mark.parametrize(
    ("status", "body", "printed"),
    [
        (200, b'{"status": "ready"}', "ready"),
        (503, PROBLEM.encode(), "broker: refused; database: gone"),
        (502, b"<html>", "the API answers with status 502"),
        (500, b'{"detail": "x"}', "the API answers with status 500"),
    ],
)
def test_it_says_what_readyz_says(
    status: int, body: bytes, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status, body) as port:
        monkeypatch.setenv("CLIPRD_PORT", str(port))
        assert main() == (0 if status == 200 else 1)
    assert capsys.readouterr().out == f"{printed}\n"


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("CLIPRD_PORT", str(taken.getsockname()[1]))
        assert main() == 1
    assert "does not answer" in capsys.readouterr().out
