"""Training over two machines, each a network namespace with its own loopback and one cable between them, that share a run directory.

Needs root and `ip` (iproute2), to make the namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cliprd_core import train
from cliprd_core.connections import PEER_TIMEOUT_VARIABLE
from cliprd_core.run_dir import ERROR_FILE, RESULT_FILE, SPEC_FILE, ErrorReason, ErrorRecord, read_record
from tests.held_trainer import held_by_this
from tests.process_group import run_processes, set_group_environment
from tests.training_runs import ROOT, TIMEOUT_SECONDS, assert_same_weights, make_inputs, metrics, wait_for_step

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # of a block that is for documentation, so nobody's
INTERFACE = "eth0"
PORT = 29400
PEER_TIMEOUT_SECONDS = 2
NUM_STEPS = 60
TRAINER, HELD_TRAINER = "cliprd_core.train", "tests.held_trainer"
RUNTIME = ROOT / "k8s/overlays/multi-node/runtime.yaml"
Started = list["subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Node:
    """One machine."""

    rank: int
    namespace: str

    def start(self, command: list[str], run: Path, *, attempt: int, **environment: str) -> subprocess.Popen[bytes]:
        """`command` on this machine; what it prints goes to the run's log."""
        with (run / "log.txt").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, sys.executable, *command, str(run / SPEC_FILE)],
                cwd=ROOT,
                env=os.environ
                | {"GLOO_SOCKET_IFNAME": INTERFACE, PEER_TIMEOUT_VARIABLE: str(PEER_TIMEOUT_SECONDS), "CLIPRD_ATTEMPT": str(attempt)}
                | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """All its processes at once, as the end of the machine would."""
        self._signal(signal.SIGKILL)

    def vanish(self) -> None:
        """Its network goes, then all its processes, which are stopped before that: they must not find out that they are alone."""
        self._signal(signal.SIGSTOP)
        self.set_cable("down")
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for pid in ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):  # ended meanwhile
                os.kill(int(pid), number)

    def set_cable(self, state: str) -> None:
        ip("-netns", self.namespace, "link", "set", INTERFACE, state)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip` (iproute2)")
    nodes = (Node(0, f"cliprd-{os.getpid()}-0"), Node(1, f"cliprd-{os.getpid()}-1"))
    try:
        try:
            connect(*nodes)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield nodes
    finally:
        made = ip("netns", "list").split()
        for node in nodes:
            if node.namespace in made:
                node.kill()
                ip("netns", "delete", node.namespace)


def connect(first: Node, second: Node) -> None:
    """Make both machines and the cable between them."""
    for node in (first, second):
        ip("netns", "add", node.namespace)
    peer = ("peer", "name", INTERFACE, "netns", second.namespace)
    ip("link", "add", INTERFACE, "netns", first.namespace, "type", "veth", *peer)
    for node in (first, second):
        ip("-netns", node.namespace, "address", "add", f"{ADDRESSES[node.rank]}/24", "dev", INTERFACE)
        ip("-netns", node.namespace, "link", "set", "lo", "up")
        node.set_cable("up")


def held(node: Node, lost: Node, step: int) -> dict[str, str]:
    """The machine that is to be lost does not begin this step, so that the run does not end first."""
    return held_by_this(step) if node is lost else {}


def torchrun(nodes: tuple[Node, Node], run: Path, *, attempt: int, lost: Node, held_step: int) -> Started:
    """By hand, with the rendezvous that torchrun calls c10d."""
    common = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=run"]
    started = []
    for node in nodes:
        # Whether it is the host, torchrun would know if the address were its host name's.
        own = [
            f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}",
            f"--rdzv-conf=is_host={int(node.rank == 0)}",
            f"--local-addr={ADDRESSES[node.rank]}",
        ]
        started.append(node.start([*common, *own, "-m", HELD_TRAINER], run, attempt=attempt, **held(node, lost, held_step)))
    return started


def trainer_operator(nodes: tuple[Node, Node], run: Path, *, attempt: int, lost: Node, held_step: int) -> Started:
    """As Kubeflow Trainer would: the command that k8s/ has for it, and variables for the rest. The rendezvous is then the static one."""
    runtime = yaml.safe_load(RUNTIME.read_text())["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    executable, *options, trainer = runtime["spec"]["template"]["spec"]["containers"][0]["command"]
    assert (executable, options[-1], trainer) == ("torchrun", "-m", TRAINER)
    variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": ADDRESSES[0], "PET_MASTER_PORT": str(PORT)}
    command = ["-m", "torch.distributed.run", *options, HELD_TRAINER]
    return [
        node.start(command, run, attempt=attempt, PET_NODE_RANK=str(node.rank), **variables, **held(node, lost, held_step))
        for node in nodes
    ]


def srun(nodes: tuple[Node, Node], run: Path, *, attempt: int) -> Started:
    """As SLURM's `srun` would start it: no launcher in between."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": ",".join(ADDRESSES)}
    return [node.start(["-m", TRAINER], run, attempt=attempt, SLURM_PROCID=str(node.rank), SLURM_LOCALID="0", **step) for node in nodes]


def train_undisturbed(rank: int, num_processes: int, port: int, run: Path) -> None:
    set_group_environment(rank, num_processes, port)
    assert train.main([str(run / SPEC_FILE)]) == 0


def assert_it_says_who_is_gone(survivor: subprocess.Popen[bytes], run: Path, lost: Node) -> None:
    assert survivor.wait(TIMEOUT_SECONDS) != 0
    error = read_record(run / ERROR_FILE, ErrorRecord)
    assert error is not None, (run / "log.txt").read_text()
    assert error.reason is ErrorReason.WORKER_LOST, error
    assert "resumes from its newest checkpoint" in error.advice
    assert ADDRESSES[lost.rank] in error.message
    assert not (run / RESULT_FILE).exists()


@pytest.mark.timeout(1200)
def test_a_run_that_lost_machines_ends_with_the_weights_of_one_that_did_not(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """First all of one machine is killed, which its connections tell; then the other vanishes, which nothing tells but its silence."""
    training = {"epochs": NUM_STEPS // 4, "checkpoint_every_steps": 5}
    spec = make_inputs(tmp_path).spec(training=training, evaluation={"every_epochs": NUM_STEPS})
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    for folder in (run, undisturbed):
        folder.mkdir()
        (folder / SPEC_FILE).write_text(spec.model_dump_json())
    run_processes(train_undisturbed, 2, undisturbed, imports=["cliprd_core.trainer"])

    started = torchrun(nodes, run, attempt=1, lost=nodes[0], held_step=30)
    wait_for_step(run, 8, started[0])
    nodes[0].kill()  # where the launchers meet, too
    assert_it_says_who_is_gone(started[1], run, lost=nodes[0])
    started[0].wait()

    started = trainer_operator(nodes, run, attempt=2, lost=nodes[1], held_step=45)
    wait_for_step(run, 20, started[0], attempt=2)
    nodes[1].vanish()
    assert_it_says_who_is_gone(started[0], run, lost=nodes[1])
    started[1].wait()
    nodes[1].set_cable("up")

    started = srun(nodes, run, attempt=3)
    assert [process.wait(TIMEOUT_SECONDS) for process in started] == [0, 0], (run / "log.txt").read_text()
    steps = {attempt: [record.step for record in metrics(run) if record.attempt == attempt] for attempt in (1, 2, 3)}
    for attempt in (2, 3):
        assert 1 < steps[attempt][0] <= steps[attempt - 1][-1] + 1, "from the newest checkpoint"
    assert steps[3][-1] == NUM_STEPS
    assert_same_weights(run, undisturbed)
