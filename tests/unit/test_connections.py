"""Connections that expect signs of life. That a machine which vanishes is noticed is an acceptance test."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cliprd_core.connections import PEER_TIMEOUT_VARIABLE, bound_silence

DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """A listener, a connection to it, and a datagram socket."""
    with socket.socket() as listener, socket.socket() as connection, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        connection.connect(listener.getsockname())
        yield listener, connection, datagrams


def open_sockets() -> set[tuple[str, str]]:
    """Of this process: descriptor and what it is of."""
    found = set()
    for descriptor in DESCRIPTORS.iterdir():
        with suppress(FileNotFoundError):  # that of the list itself
            found.add((descriptor.name, str(descriptor.readlink())))
    return {(name, target) for name, target in found if target.startswith("socket:")}


def options(connection: socket.socket) -> list[int]:
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
    return [
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        *(connection.getsockopt(socket.IPPROTO_TCP, name) for name in names),
    ]


@pytest.mark.parametrize(("given", "expected"), [("1", [1, 1, 1, 1000]), (None, [1, 20, 10, 60_000])])
def test_connections_and_those_accepted_later_are_bounded(
    sockets: tuple[socket.socket, socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    expected: list[int],
) -> None:
    listener, connection, datagrams = sockets
    monkeypatch.delenv(PEER_TIMEOUT_VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(PEER_TIMEOUT_VARIABLE, given)
    gc.collect()  # not in between, when it may close what an earlier test has left
    open_before = open_sockets()
    bound_silence()
    assert options(connection) == expected
    listener.accept()[0].close()  # the connection from before
    with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert options(accepted) == expected
    assert datagrams.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    assert open_sockets() == open_before, "nothing is left open, nothing closed"


@pytest.mark.parametrize("given", ["0", "-1", "soon", "", "40000", "1.5"])
def test_a_wrong_timeout_says_what_is_right(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(PEER_TIMEOUT_VARIABLE, given)
    with pytest.raises(ValueError, match=r"CLIPRD_PEER_TIMEOUT_SECONDS is .* whole number of seconds from 1 to 32,767"):
        bound_silence()
