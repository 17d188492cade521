"""The launcher's variables: torchrun's as they are, SLURM's under torchrun's names."""

from __future__ import annotations

import os

import pytest

from cliprd_core.launcher import adopt_launcher_environment, first_host, is_first_of_machine

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_JOB_ID": "31234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODELIST": "gpu[03-04]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test sets in the environment ends with it."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES and not name.startswith("SLURM_")}
    monkeypatch.setattr(os, "environ", kept)


def adopted(**environment: str) -> dict[str, str]:
    os.environ.update(environment)
    adopt_launcher_environment()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_srun_speaks_for_every_variable() -> None:
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "24567"}
    assert adopted(**SRUN) == expected
    assert not is_first_of_machine()


def test_torchrun_rules_inside_srun() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert adopted(**SRUN, **torchrun) == torchrun
    assert is_first_of_machine()


def test_the_meeting_point_may_be_set_by_hand() -> None:
    found = adopted(**SRUN, MASTER_ADDR="10.1.1.1", MASTER_PORT="29500")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.1.1.1", "29500")


def test_the_launching_machine_stands_in_for_the_list_of_machines() -> None:
    without_list = {name: value for name, value in SRUN.items() if name != "SLURM_NODELIST"}
    assert adopted(**without_list)["MASTER_ADDR"] == "10.0.0.1"


def test_a_batch_script_without_srun_runs_alone() -> None:
    assert adopted(**{name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}) == {}


def test_a_step_of_one_task_runs_alone() -> None:
    assert adopted(**SRUN | {"SLURM_NTASKS": "1"}) == {}


def test_without_an_address_it_says_what_to_set() -> None:
    bare = {name: value for name, value in SRUN.items() if name not in ("SLURM_NODELIST", "SLURM_LAUNCH_NODE_IPADDR")}
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        adopted(**bare)


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[01-04,07],login", "gpu01"),
        ("gpu[7,9]", "gpu7"),
        ("rack[2-3]n[0-9]", "rack2n0"),
        ("n[1-2]-ib.example", "n1-ib.example"),
    ],
)
def test_first_machine_of_a_list(node_list: str, first: str) -> None:
    assert first_host(node_list) == first
