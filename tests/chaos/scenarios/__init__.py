"""The scenarios, a module for each kind of part that fails. Importing this package registers them all."""

from tests.chaos.scenarios import api, broker, checkpoints, clock, database, disks, killed, messages, object_store, stopped
from tests.chaos.scenarios.undisturbed import UNDISTURBED, with_undisturbed

__all__ = [
    "UNDISTURBED",
    "api",
    "broker",
    "checkpoints",
    "clock",
    "database",
    "disks",
    "killed",
    "messages",
    "object_store",
    "stopped",
    "with_undisturbed",
]
