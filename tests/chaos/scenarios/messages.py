"""Messages that come twice, late, or never."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from celery import Celery
from sqlalchemy import Connection, text

from service.queue import RUN_JOB_TASK
from service.store.session import make_engine
from tests.chaos.lab import Lab
from tests.chaos.scenario import scenario
from tests.live import eventually

QUEUE = "default"
NUM_COPIES = 20


def send_copies(lab: Lab, job_id: str) -> None:
    """The job's message as many times as NUM_COPIES."""
    with Celery(broker=lab.stack.redis.url, set_as_current=False) as broker:
        for _ in range(NUM_COPIES):
            broker.send_task(RUN_JOB_TASK, args=[job_id], queue=QUEUE)


def wait_until_taken(lab: Lab) -> None:
    """Until no message is left."""
    with redis.Redis.from_url(lab.stack.redis.url) as broker:
        eventually(lambda: broker.llen(QUEUE) == 0 or None)


@scenario("message-lost-then-late", "a job's message is lost; more of them come when the job has ended")
def message_lost(lab: Lab) -> str:
    for worker in lab.workers:
        worker.child.stop()
    job_id = lab.train()
    with redis.Redis.from_url(lab.stack.redis.url) as broker:
        assert eventually(lambda: broker.lpop(QUEUE))
    lab.struck(job_id)
    for worker in lab.workers:
        worker.child.start()
    assert lab.finish(job_id).attempt == 1
    send_copies(lab, job_id)
    wait_until_taken(lab)
    assert lab.client.job(job_id).attempt == 1
    return f"{NUM_COPIES} late messages changed nothing"


@scenario("messages-duplicated", "messages of a running job come many times, also to a worker that is idle")
def messages_duplicated(lab: Lab) -> str:
    job_id = lab.train()
    lab.wait_for_step(job_id, 1)
    send_copies(lab, job_id)
    lab.struck(job_id)
    wait_until_taken(lab)
    assert lab.finish(job_id).attempt == 1
    return f"{NUM_COPIES} more messages changed nothing"


@scenario("two-workers-claim", "two idle workers find many messages of one job at the same moment")
def two_workers_claim(lab: Lab) -> str:
    for worker in lab.workers:
        worker.wait_until_ready()
    for worker in lab.workers:
        worker.signal(signal.SIGSTOP)
    job_id = lab.train()
    send_copies(lab, job_id)
    with claims_wait(lab, job_id):
        for worker in lab.workers:
            worker.signal(signal.SIGCONT)
    lab.struck(job_id)
    assert lab.finish(job_id).attempt == 1
    wait_until_taken(lab)
    return f"{NUM_COPIES} messages; both workers were claiming it at the same moment"


@contextmanager
def claims_wait(lab: Lab, job_id: str) -> Iterator[None]:
    """Afterwards each worker is in the middle of its claim of this job before any of them may go on."""
    engine = make_engine(lab.stack.database_url)
    try:
        with engine.connect() as holder, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looker:
            holder.execute(text("SELECT id FROM jobs WHERE id = :job_id FOR UPDATE"), {"job_id": job_id})
            yield
            eventually(lambda: num_claiming(looker) == len(lab.workers) or None)
            holder.rollback()
    finally:
        engine.dispose()


def num_claiming(connection: Connection) -> int:
    """Transactions that wait for a job's row to make it running. In a transaction one would see the same number again and again."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE jobs SET state=%'"
    return int(connection.execute(text(waiting)).scalar_one())
