"""A TCP proxy before a server: the network that fails."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHUNK_BYTES = 64 * 1024
ANSWER_SECONDS = 0.05
"""What a server takes at most, as a rule, to do what it was sent."""


class Network(Enum):
    """What becomes of bytes and of connections."""

    WHOLE = auto()
    REFUSING = auto()
    """Connections break, and new ones are refused at once, as by a machine whose server is down."""
    SILENT = auto()
    """Nothing arrives, and nothing is said of it, as behind a broken switch. What was sent arrives late, once the network is whole."""
    CUTTING = auto()
    """Connections break at random: before what was sent has arrived, or after, so that an answer is lost."""


class Proxy:
    """Context manager: listens on a port of this machine and forwards to a server of this machine, as the network allows.

    Args:
        target: The server's Unix socket, or its port.
        cut_probability: Of each chunk that a client sends while the network is CUTTING.
        rng: Decides which.
    """

    def __init__(self, target: Path | int, *, cut_probability: float = 0.0, rng: random.Random | None = None) -> None:
        self._target = target
        self._cut_probability = cut_probability
        self._rng = rng or random.Random()
        self._network = Network.WHOLE
        self._is_passing = asyncio.Event()
        self._is_passing.set()
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.port = 0
        self.num_cut = 0
        """Connections broken while the network was CUTTING."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, network: Network) -> None:
        """Change the network from now on."""
        self._call(self._set(network))

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        self._is_passing.set()
        self._break_all()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _set(self, network: Network) -> None:
        before, self._network = self._network, network
        if network is Network.SILENT:
            self._is_passing.clear()
        else:
            self._is_passing.set()
        if network is Network.REFUSING:
            self._server.close()
            self._break_all()
        elif before is Network.REFUSING:
            await self._listen()

    def _break_all(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            await self._is_passing.wait()
            server_reader, connection.to_server = await self._connect()
            await asyncio.gather(self._forward_requests(reader, connection), self._forward_answers(server_reader, connection))
        except (OSError, asyncio.CancelledError):  # broken, or the server is down; streams complain of handlers that were cancelled
            connection.reset()
        finally:
            self._connections.remove(connection)
            connection.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, Path):
            return await asyncio.open_unix_connection(str(self._target))
        return await asyncio.open_connection("127.0.0.1", self._target)

    async def _forward_requests(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        assert connection.to_server is not None
        while chunk := await reader.read(CHUNK_BYTES):
            await self._is_passing.wait()
            fate = self._rng.random() if self._network is Network.CUTTING else 1.0
            if fate < self._cut_probability:
                self.num_cut += 1
                if fate < self._cut_probability / 2:  # it arrives, but the answer will not
                    connection.answers_are_lost = True
                    connection.to_server.write(chunk)
                    await asyncio.sleep(ANSWER_SECONDS)
                connection.reset()
                return
            connection.to_server.write(chunk)
            await connection.to_server.drain()
        connection.to_server.close()

    async def _forward_answers(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            await self._is_passing.wait()
            if not connection.answers_are_lost:
                connection.to_client.write(chunk)
                await connection.to_client.drain()
        connection.to_client.close()


class _Connection:
    """A client's connection, and the proxy's own to the server."""

    def __init__(self, to_client: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self.to_server: asyncio.StreamWriter | None = None
        self.answers_are_lost = False

    def close(self) -> None:
        for writer in (self.to_client, self.to_server):
            if writer is not None:
                writer.close()

    def reset(self) -> None:
        """Break it such that the client notices at once: without this option what was sent would be followed by a polite end."""
        if not self.to_client.is_closing():
            own = self.to_client.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for writer in (self.to_client, self.to_server):
            if writer is not None:
                writer.transport.abort()
