"""S3 as the artifact store, and the network before it: a server of moto's behind a proxy."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import boto3
from moto.server import ThreadedMotoServer

from service.store.kinds import ArtifactKind
from tests.chaos.lab import Bench, Lab
from tests.chaos.proxy import Network, Proxy
from tests.chaos.scenario import scenario
from tests.live import eventually

BUCKET = "models"
IN_S3 = {"CLIPRD_ARTIFACTS_URL": f"s3://{BUCKET}/chaos"}


@contextmanager
def object_store(_bench: Bench, _home: Path) -> Iterator[Proxy]:
    """An S3 server with an empty bucket, which all that is started meanwhile finds behind the proxy, as any AWS tool does."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else it tells every request, between the lines of the table
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        with Proxy(port) as proxy:
            found = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            with patch.dict(os.environ, found):
                boto3.client("s3").create_bucket(Bucket=BUCKET)
                yield proxy
    finally:
        server.stop()


@scenario(
    "s3-unreachable",
    "S3, the artifact store, unreachable from a checkpoint on until the model has waited for its upload",
    settings=IN_S3,
    around=object_store,
)
def s3_unreachable(lab: Lab) -> str:
    job_id = lab.train_to_checkpoint()
    eventually(lambda: list(lab.client.artifacts(job_id)) or None)
    lab.around.set(Network.REFUSING)
    with lab.outage(job_id) as outage:
        eventually(lambda: any(record.step == lab.bench.num_steps for record in lab.records(job_id)) or None)
        trained_after = outage.seconds_so_far
        outage.wait()
        assert not [one for one in lab.client.artifacts(job_id) if one.kind is ArtifactKind.MODEL]
        assert not lab.stack.is_ready()
        lab.around.set(Network.WHOLE)
    assert lab.finish(job_id).attempt == 1, "a short absence costs no attempt"
    return f"trained to the end in {trained_after:.0f} s of it; away for {lab.bench.outage_seconds:.0f} s"


@scenario(
    "s3-silent-at-resume",
    "a worker killed, and S3 silent while another one, with a disk of its own, fetches the checkpoint",
    settings=IN_S3,
    are_apart=True,
    around=object_store,
)
def s3_silent_at_resume(lab: Lab) -> str:
    job_id = lab.train_to_checkpoint()
    eventually(lambda: [one for one in lab.client.artifacts(job_id) if one.kind is ArtifactKind.CHECKPOINT] or None)
    holder = lab.holder(job_id)
    lab.around.set(Network.SILENT)
    holder.kill()
    with lab.outage(job_id) as outage:
        lab.wait_for_attempt(job_id, 2)
        outage.wait()
        lab.around.set(Network.WHOLE)
    assert lab.finish(job_id).attempt == 2
    first = min(record.step for record in lab.records(job_id) if record.attempt == 2)
    assert first > 1, "it started anew, though its checkpoint was only out of reach"
    return f"away for {lab.bench.outage_seconds:.0f} s"
