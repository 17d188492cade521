"""Serves the API from several processes on one port (uvicorn's supervisor, which replaces one that dies).

Each has a listening socket of its own (SO_REUSEPORT), among which the kernel spreads connections evenly. With the one that uvicorn shares
among them, whichever wakes up first takes nearly all of a burst.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess


class SharedPort(socket.socket):
    """A socket with a host and port that other sockets of this user may have, too. Sent to another process, it becomes a new one there.

    Raises:
        OSError: someone has the port alone, or the host is none of this machine's.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.bind((host, port))

    def __reduce__(self) -> tuple[Callable[..., SharedPort], tuple[Any, ...]]:
        return SharedPort, self.getsockname()[:2]


def serve(app: str, *, host: str, port: int, processes: int, shutdown_seconds: int) -> None:
    """Serve until interrupted.

    Args:
        app: Names what makes the app, in each process.
        host: Of this machine, by name or address.
        port: Nobody else may listen on it.
        processes: How many answer requests; this one doesn't.
        shutdown_seconds: That requests have to end.
    """
    config = uvicorn.Config(app, factory=True, workers=processes, host=host, port=port, timeout_graceful_shutdown=shutdown_seconds)
    config.bind_socket().close()  # which exits if somebody else has the port, even with a shared one, or there is no such host
    try:
        with SharedPort(host, port) as ours:  # held, not listened on, so that nobody else has it while a process is replaced
            Multiprocess(config, sockets=[ours]).run()
    except OSError as error:
        sys.exit(f"cliprd: can't listen on {host}:{port}: {error}")
