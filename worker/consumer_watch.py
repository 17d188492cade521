"""Does the Celery worker consume its queues? Seen from inside its event loop, since a worker can be alive, connected, and deaf.

That happens: after a broker came back, workers of some versions have answered pings for days and taken no task. So what counts is that
the broker answers the consumer's own requests for messages (Redis answers each BRPOP within a second, with a message or without).
A worker that is busy asks for none, and counts as consuming as long as its event loop runs; whether its child works,
`ChildWatch` sees.

One kind of deafness is mended here: kombu counts a message whose acknowledgement broke with its connection as one at work, for ever, and so
asks for no other one. Celery logs that ("Couldn't ack") and keeps its connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

from celery import bootsteps
from celery.worker import state

LOOK_SECONDS = 1.0
SILENCE_SECONDS = 10.0
"""An event loop that hasn't run for this long, or a broker that hasn't answered, counts as a fault. Both are heard every second."""


class LostAcknowledgementError(ConnectionError):
    """The consumer counts as busy though it has no message. Being an error of the connection, it makes Celery's event loop end, and begin
    again with a new connection that counts anew."""


class ConsumerWatch:
    """What the event loop of the worker's parent process tells, for other threads to ask.

    Args:
        queues: Those that the worker should consume.
    """

    def __init__(self, queues: Sequence[str]) -> None:
        self.is_shutting_down = False
        """Set by whoever is told to stop."""
        self.message: str | None = None
        """Id of the message that the pool's child works on; None: it is free."""
        self._queues = tuple(queues)
        self._missing: tuple[str, ...] = ()
        self._looked_at: float | None = None
        self._heard_at: float | None = None
        self._was_full_for_nothing = False

    def problem(self) -> str | None:
        """Why the worker does not consume; None: it does."""
        if self.is_shutting_down:
            return "it is shutting down"
        looked_at, missing = self._looked_at, self._missing
        if looked_at is None:
            return "it is not connected to the broker"
        silence = time.monotonic() - looked_at
        if silence > SILENCE_SECONDS:
            return f"its event loop has not run for {silence:.0f} s"
        return f"it does not consume {', '.join(missing)}" if missing else self._silence()

    def _silence(self) -> str | None:
        heard_at = self._heard_at
        if heard_at is None:
            return "the broker has not answered it yet"
        silence = time.monotonic() - heard_at
        return f"it has had no answer from the broker for {silence:.0f} s" if silence > SILENCE_SECONDS else None

    def connected(self, channel: Any) -> None:
        """Listen to a new connection's channel (kombu's for Redis): an answer without a message raises Empty."""
        self._heard_at, self._was_full_for_nothing = None, False
        handlers: dict[str, Callable[[], Any]] = channel.handlers
        read = handlers["BRPOP"]

        def noting() -> Any:
            try:
                answer = read()
            except Empty:
                self._heard_at = time.monotonic()
                raise
            self._heard_at = time.monotonic()
            return answer

        handlers["BRPOP"] = noting

    def look(self, consumer: Any) -> None:
        """To be called from the event loop every LOOK_SECONDS.

        Args:
            consumer: Celery's task consumer (a kombu.Consumer).

        Raises:
            LostAcknowledgementError: twice in a row it was full without a message.
        """
        now = time.monotonic()
        self._missing = tuple(queue for queue in self._queues if not consumer.consuming_from(queue))
        self.message = next((request.id for request in list(state.reserved_requests)), None)
        self._looked_at = now
        is_full = not consumer.channel.qos.can_consume()
        if is_full and self.message is not None:  # busy: it asks for nothing, so there is nothing to be heard
            self._heard_at = now
        was_full, self._was_full_for_nothing = self._was_full_for_nothing, is_full and self.message is None
        if was_full and self._was_full_for_nothing and not self.is_shutting_down:
            raise LostAcknowledgementError("an acknowledgement was lost, so that no further message is asked for")

    def disconnected(self) -> None:
        self._looked_at = None


def watching_step(watch: ConsumerWatch) -> type[bootsteps.StartStopStep]:
    """A part of Celery's consumer that tells `watch`. It starts and stops with each connection to the broker."""

    class WatchConsumer(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            super().__init__(parent, **kwargs)
            self._timer: Any = None

        def start(self, parent: Any) -> None:
            watch.connected(parent.task_consumer.channel)

        def register_with_event_loop(self, parent: Any, hub: Any) -> None:
            """Celery calls this each time the event loop begins."""
            self._timer = hub.call_repeatedly(LOOK_SECONDS, watch.look, parent.task_consumer)

        def stop(self, parent: Any) -> None:  # noqa: ARG002
            watch.disconnected()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return WatchConsumer
