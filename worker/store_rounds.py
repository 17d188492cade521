"""Rounds whose parts work on the database, and do not stop each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.orm import Session, sessionmaker

from service.store.session import make_engine, make_sessions
from worker.held_job import OUT_OF_REACH
from worker.rounds import Rounds

logger = logging.getLogger(__name__)


class Turn:
    """One round's way to the database. No connection of it stays open after the round, nor while forks are allowed: a child must not
    inherit one (SQLite forbids it)."""

    def __init__(self, database_url: str, rounds: Rounds) -> None:
        self._engine = make_engine(database_url)
        self._rounds = rounds
        self.sessions: sessionmaker[Session] = make_sessions(self._engine)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what needs no database and may take long: the network, a slow disk."""
        self.close()
        with self._rounds.forks_allowed():
            yield

    def close(self) -> None:
        """Close all connections; `sessions` opens new ones."""
        self._engine.dispose()


Part = Callable[[Turn], None]


class StoreRounds(Rounds):
    """Rounds of several parts. Whatever fails in one of them, the others have their turn.

    Args:
        name: In the log, and of the thread.
        database_url: As the settings'.
        parts: What a round does, in this order. Their names are told when they fail.
        pause_seconds: From the end of a round to the next one.
    """

    def __init__(self, name: str, database_url: str, parts: Sequence[Part], *, pause_seconds: float) -> None:
        super().__init__(name, self._all_parts, pause_seconds=pause_seconds)
        self._database_url = database_url
        self._parts = parts

    def _all_parts(self) -> None:
        turn = Turn(self._database_url, self)
        try:
            for part in self._parts:
                self._one_part(part, turn)
        finally:
            turn.close()

    def _one_part(self, part: Part, turn: Turn) -> None:
        what = part.__name__.strip("_")
        try:
            part(turn)
        except OUT_OF_REACH as error:
            logger.warning("%s, %s: a store is out of reach (%s)", self.name, what, type(error).__name__)
        except Exception:  # whatever it is, the next round may do better
            logger.exception("%s, %s: failed; the rest of the round goes on", self.name, what)
