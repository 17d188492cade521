"""PostgreSQL, which holds all that is true of jobs, and the network before it."""

from __future__ import annotations

from tests.chaos.lab import Bench, Lab
from tests.chaos.paced_trainer import PACE_VARIABLE
from tests.chaos.proxy import Network
from tests.chaos.scenario import scenario
from tests.live import SHORT_LEASES, eventually
from worker.settings import WorkerSettings

FIRST_STEPS = 3
MAX_OUTAGE_SECONDS = 60.0


@scenario("postgres-restarted", "PostgreSQL restarted in good order while a job trains")
def postgres_restarted(lab: Lab) -> None:
    restart(lab, "fast")


@scenario("postgres-crashed", "PostgreSQL ended without writing anything more, and started again from its log")
def postgres_crashed(lab: Lab) -> None:
    restart(lab, "immediate")


def restart(lab: Lab, mode: str) -> None:
    job_id = lab.train_to_checkpoint()
    lab.bench.postgres.control("restart", "-m", mode)
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 1, "a short absence costs no attempt"


def train_through(bench: Bench) -> dict[str, str]:
    """The lease and heartbeat that workers have where nobody sets them, and a run that outlasts the outage."""
    defaults = {name: WorkerSettings.model_fields[name].default for name in ("lease_seconds", "heartbeat_seconds")}
    assert bench.outage_seconds <= MAX_OUTAGE_SECONDS, "a worker does not train on for longer without its database"
    return {
        **{f"CLIPRD_{name.upper()}": str(value) for name, value in defaults.items()},
        PACE_VARIABLE: str(bench.outage_seconds / (bench.num_steps - 2 * FIRST_STEPS)),
    }


@scenario("postgres-unreachable", "PostgreSQL unreachable while a job trains on; leases as by default", settings=train_through)
def postgres_unreachable(lab: Lab) -> str:
    return train_without(lab, Network.REFUSING)


@scenario("postgres-silent", "nothing arrives at PostgreSQL or from it while a job trains on, then late; likewise", settings=train_through)
def postgres_silent(lab: Lab) -> str:
    return train_without(lab, Network.SILENT)


def train_without(lab: Lab, network: Network) -> str:
    job_id = lab.train()
    lab.wait_for_step(job_id, FIRST_STEPS)
    lab.stack.proxy.set(network)
    before = len(lab.records(job_id))
    with lab.outage(job_id) as outage:
        outage.wait()
        trained = len(lab.records(job_id)) - before
        lab.stack.proxy.set(Network.WHOLE)
    assert trained > lab.bench.num_steps / 2, f"only {trained} steps were trained meanwhile"
    assert lab.finish(job_id).attempt == 1
    return f"away for {lab.bench.outage_seconds:.0f} s, in which {trained} steps were trained"


@scenario("postgres-silent-past-lease", "nothing arrives at PostgreSQL or from it for longer than the lease lasts, then late")
def postgres_silent_past_lease(lab: Lab) -> str:
    job_id = lab.train_to_checkpoint()
    lab.stack.proxy.set(Network.SILENT)
    with lab.outage(job_id, 3 * float(SHORT_LEASES["CLIPRD_LEASE_SECONDS"])) as outage:
        eventually(lambda: not lab.ranks(job_id) or None)
        stopped_after = outage.seconds_so_far
        outage.wait()
        lab.stack.proxy.set(Network.WHOLE)
    assert lab.finish(job_id).attempt == 2
    return f"the worker ended its run {stopped_after:.1f} s after it fell silent"


@scenario("connections-cut", "connections to PostgreSQL break at random, before or after what was sent has arrived")
def connections_cut(lab: Lab) -> str:
    lab.stack.proxy.set(Network.CUTTING)
    job_id = lab.train()
    lab.struck(job_id)
    lab.finish(job_id)
    lab.stack.proxy.set(Network.WHOLE)
    assert lab.stack.proxy.num_cut > 0
    return f"{lab.stack.proxy.num_cut} connections broke"
