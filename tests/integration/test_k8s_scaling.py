"""What KEDA asks the database for counts the jobs that need a worker."""

from __future__ import annotations

from pathlib import Path

import psycopg
import yaml

from cliprd_core.spec import JobSpec
from service.store.session import make_engine, make_sessions, migrate
from tests.store_helpers import claim, create, distilled_spec, finish, spec_dict

SCALED_OBJECT = Path(__file__).parents[2] / "k8s/components/keda/worker/scaled-object.yaml"


def test_the_query_counts_what_runs_and_what_is_queued(postgres_url: str) -> None:
    query = yaml.safe_load(SCALED_OBJECT.read_text())["spec"]["triggers"][0]["metadata"]["query"]
    migrate(postgres_url)
    engine = make_engine(postgres_url)
    sessions = make_sessions(engine)

    def num_workers() -> int:
        with psycopg.connect(postgres_url) as connection:
            row = connection.execute(query).fetchone()
            assert row is not None
            return int(row[0])

    assert num_workers() == 0
    teacher = create(sessions)
    create(sessions, distilled_spec(teacher.id))
    assert num_workers() == 1, "a job that waits for its teacher needs no worker yet"
    create(sessions, JobSpec.model_validate(spec_dict(resources={"queue": "h100"})))
    assert num_workers() == 1, "another queue has workers of its own"
    claimed = claim(sessions, teacher.id)
    assert num_workers() == 1, "a running job keeps its worker, though no message of it is left"
    finish(sessions, claimed)
    assert num_workers() == 1, "the student can start"
    engine.dispose()
