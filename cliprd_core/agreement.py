"""Before the first step: do all training processes, on whatever machines, see one run?

Several machines may hold different copies of the spec, the data or the run directory. Training would then go on, and learn something
that nobody asked for, or save checkpoints where a restart does not find them. So the processes compare what they see first.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from cliprd_core import distributed
from cliprd_core.checkpoint import latest_valid, marker_digest
from cliprd_core.control import ControlGroup
from cliprd_core.run_dir import checkpoint_dir


def check_agreement(control: ControlGroup, seen: Mapping[str, str | None]) -> None:
    """Compare `seen`, which maps what is compared to this process's value, over all processes.

    Raises:
        ValueError: on every rank, if any value differs from rank 0's; it names what, and the machine where it differs.
    """
    complaint = None
    gathered = control.gather((socket.gethostname(), dict(seen)))
    if gathered is not None:
        main_host, expected = gathered[0]
        for rank, (host, values) in enumerate(gathered):
            different = [name for name in expected if values.get(name) != expected[name]]
            if different:
                complaint = (
                    f"the training processes do not agree on {', '.join(different)}: rank {rank} on {host} differs from rank 0 on"
                    f" {main_host}; give every machine the same spec, data and models, and one run directory that all of them share"
                )
                break
    _raise_everywhere(complaint, control)


def check_run_dir_is_shared(run_dir: Path, control: ControlGroup) -> None:
    """Rank 0 leaves a file in the run directory, and all others look for it.

    Raises:
        ValueError: on every rank, if one does not find it; it names the machine.
    """
    if distributed.world_size() == 1:
        return
    name = control.broadcast(f".shared-{secrets.token_hex(8)}")
    probe = run_dir / name
    if distributed.is_main():
        probe.touch()
    control.wait()
    gathered = control.gather(None if probe.exists() else socket.gethostname())
    complaint = None
    if gathered is not None:
        probe.unlink()
        missing = sorted({host for host in gathered if host is not None})
        if missing:
            complaint = (
                f"the run directory {run_dir} of rank 0 on {socket.gethostname()} is not the one that {', '.join(missing)} sees;"
                " all machines of a run need one shared folder for it (NFS, Lustre, a ReadWriteMany volume), or a restart could not resume"
            )
    _raise_everywhere(complaint, control)


def agreed_checkpoint(run_dir: Path, control: ControlGroup) -> Path | None:
    """The newest valid checkpoint as rank 0 finds it, at this process's own path; None where rank 0 finds none.

    Raises:
        ValueError: on every rank, if one sees another checkpoint at that step, or none.
    """
    found = latest_valid(run_dir) if distributed.is_main() else None
    name = control.broadcast(None if found is None else found.name)
    if name is None:
        return None
    folder = checkpoint_dir(run_dir, int(name.removeprefix("step-")))
    check_agreement(control, {f"the checkpoint {name}": marker_digest(folder)})
    return folder


def _raise_everywhere(complaint: str | None, control: ControlGroup) -> None:
    """What rank 0 found wrong, as a ValueError on every rank; None: nothing."""
    if (told := control.broadcast(complaint)) is not None:
        raise ValueError(told)
