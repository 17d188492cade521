"""Who launched this process: the variables that torchrun sets, taken from SLURM's where only SLURM has spoken.

Nothing here loads torch, so that a process knows its rank from its first moment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
"""Where the processes of a SLURM step meet unless MASTER_PORT says otherwise: below the ports that Linux gives to clients."""


def adopt_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where srun started this process and no other launcher did.

    What is set already stays: torchrun inside srun rules, and MASTER_ADDR or MASTER_PORT may be set by hand.

    Raises:
        ValueError: SLURM's variables do not say where rank 0 is.
    """
    for name, value in _from_slurm(os.environ).items():
        os.environ.setdefault(name, value)


def is_first_of_machine() -> bool:
    """Whether this process is the first on its machine; true where the launcher does not say (one process a machine)."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """SLURM_STEP_ID is what srun's tasks have and a bare batch script lacks: there the tasks counted in SLURM_NTASKS were not started.

    (slurmstepd sets SLURM_PROCID for both, but SLURM_STEP_ID only to a step's number of zero or more, and a batch script's, like that of an
    interactive allocation, is one of the reserved ones, which are negative: Slurm's src/common/env.c and slurm/slurm.h.)
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return {}
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if int(num_tasks) == 1:
        return {}
    job = int(environment.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _slurm_main_host(environment),
        "MASTER_PORT": str(_FIRST_PORT + job % _NUM_PORTS),
    }


def _slurm_main_host(environment: Mapping[str, str]) -> str:
    """The step's first machine, where task 0 runs. SLURM_LAUNCH_NODE_IPADDR comes last: srun may have been called elsewhere."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if environment.get(name):
            return first_host(environment[name])
    if address := environment.get("SLURM_LAUNCH_NODE_IPADDR"):
        return address
    raise ValueError("SLURM_PROCID is set but neither SLURM_NODELIST nor SLURM_LAUNCH_NODE_IPADDR; set MASTER_ADDR to rank 0's machine")


def first_host(node_list: str) -> str:
    """The first name in SLURM's short form: `gpu[01-04,07],login` is `gpu01`, `rack[2-3]n[0-9]` is `rack2n0`."""
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", node_list)
    return first.split(",")[0]
