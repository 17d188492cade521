"""A receiver of webhooks that never comes to an end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Receiver:
    url: str
    is_waited_for: threading.Event = field(default_factory=threading.Event)


@contextmanager
def dripping(answer: bytes) -> Iterator[Receiver]:
    """It sends `answer`, and then a byte now and then for ever."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        receiver = Receiver(f"http://127.0.0.1:{listening.getsockname()[1]}/hook")

        def serve() -> None:
            while not ended.is_set():
                with suppress(OSError):
                    connection, _ = listening.accept()
                    with connection:
                        connection.sendall(answer)
                        receiver.is_waited_for.set()
                        while not ended.wait(0.02):
                            connection.send(b"x")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            ended.set()
            with suppress(OSError):  # wakes a thread that waits for a connection
                socket.create_connection(listening.getsockname()).close()
            thread.join()
