"""Ports for servers that tests start."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def free_port() -> int:
    """A port of the loopback interface for a server that is yet to start, or to be started again, or for nobody.

    As long as this process lives, the system gives it to nobody who asks for any port, nor to an outgoing connection, since a socket here
    is bound to it. It does not listen, so a server that names the port can have it all the same if it sets SO_REUSEADDR, as servers do.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    port: int = holder.getsockname()[1]
    return port
