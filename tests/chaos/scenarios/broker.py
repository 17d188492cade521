"""Redis, which carries messages and nothing else: it may lose them all."""

from __future__ import annotations

import signal

from service.store.states import JobState
from tests.chaos.lab import Lab
from tests.chaos.proxy import Network
from tests.chaos.scenario import scenario
from tests.live import eventually

NUM_JOBS = 3


@scenario("redis-restarted-empty", "Redis killed and started again empty: two jobs train, and a third one's message is lost")
def redis_restarted(lab: Lab) -> None:
    running = [lab.train() for _ in lab.workers]
    for job_id in running:
        lab.wait_for_step(job_id, 1)
    waiting = lab.train()
    lab.stack.redis.stop(signal.SIGKILL)
    lab.stack.redis.start()
    lab.struck(waiting)
    for job_id in (*running, waiting):
        assert lab.finish(job_id).attempt == 1


@scenario("redis-down", "Redis down; a job trains, and another is submitted meanwhile")
def redis_down(lab: Lab) -> str:
    running = lab.train_to_checkpoint()
    lab.stack.redis.stop(signal.SIGKILL)
    with lab.outage(running) as outage:
        submitted = lab.train()
        outage.wait()
        assert lab.client.job(submitted).state is JobState.QUEUED
    lab.stack.redis.start()
    lab.struck(submitted)
    for job_id in (running, submitted):
        assert lab.finish(job_id).attempt == 1
    eventually(lambda: lab.stack.is_ready() or None)
    return f"away for {lab.bench.outage_seconds:.0f} s"


@scenario("broker-connections-cut", "connections to Redis break at random, before or after what was sent has arrived")
def broker_connections_cut(lab: Lab) -> str:
    lab.stack.broker_proxy.set(Network.CUTTING)
    jobs = [lab.train() for _ in range(NUM_JOBS)]
    lab.struck(jobs[0])
    for job_id in jobs:
        assert lab.finish(job_id).attempt == 1
    lab.stack.broker_proxy.set(Network.WHOLE)
    assert lab.stack.broker_proxy.num_cut > 0
    return f"{lab.stack.broker_proxy.num_cut} connections broke"
