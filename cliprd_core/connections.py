"""How long the other machines of a run may be silent before they count as lost.

A process that is killed closes its connections, and the others notice at once. A machine that loses its power or its network closes
nothing, and Gloo asks the kernel for no signs of life: the others would wait for it until their collective times out, which takes half an
hour, and a day in the control group.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

PEER_TIMEOUT_VARIABLE = "CLIPRD_PEER_TIMEOUT_SECONDS"
"""Environment variable: after how many seconds of silence another machine of the run counts as lost."""

DEFAULT_PEER_TIMEOUT_SECONDS = 60
_MAX_SECONDS = 32_767  # the kernel's limit for TCP_KEEPIDLE


def bound_silence() -> None:
    """Have the kernel end each TCP connection of this process whose other end stays silent for CLIPRD_PEER_TIMEOUT_SECONDS.

    The other machine's kernel answers, not its process: one that computes, evaluates or is stopped for hours counts as there. Holds for
    the connections there are; what listens hands it on to those that it accepts.

    Raises:
        ValueError: the variable is not a whole number of seconds from 1 to 32,767.
    """
    seconds = _peer_timeout_seconds()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # no socket, or closed meanwhile
            _expect_signs_of_life(int(descriptor.name), seconds)


def _peer_timeout_seconds() -> int:
    given = os.environ.get(PEER_TIMEOUT_VARIABLE, str(DEFAULT_PEER_TIMEOUT_SECONDS))
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= _MAX_SECONDS):
        raise ValueError(f"{PEER_TIMEOUT_VARIABLE} is {given!r}; set it to a whole number of seconds from 1 to {_MAX_SECONDS:,}")
    return int(given)


def _expect_signs_of_life(descriptor: int, seconds: int) -> None:
    """Probe while nothing is sent (keep-alive), and give up on unanswered probes as on unanswered data (user timeout)."""
    connection = socket.socket(fileno=descriptor)
    try:
        if connection.type is socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 3))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 6))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
    finally:
        connection.detach()  # it belongs to someone else, who goes on using it
