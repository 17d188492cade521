"""`make compose-test`: the compose stack on a real Docker engine, without a GPU, from an empty machine to a restored backup.

It works on a copy of the repository, with project name, port and image tags of its own, and leaves nothing behind but the build cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.compose.stack import Stack, check, eventually, step

PROJECT = "cliprd-compose-test"
SHORT_LEASES = """\
CLIPRD_LEASE_SECONDS=20
CLIPRD_HEARTBEAT_SECONDS=4
CLIPRD_REAPER_SECONDS=2
CLIPRD_RESEND_SECONDS=10
CLIPRD_MAX_ATTEMPTS=9
OMP_NUM_THREADS=1
"""
"""Half a minute instead of several until a lost job is found; one thread, because the machine may be busy."""
LONG = {"epochs": 3, "global_batch_size": 32, "checkpoint_every_steps": 10}
"""180 steps of 32 pairs: long enough to be disturbed, and to be found running afterwards."""
NEW_MIGRATION = '''"""A table of the next version, for the test of an upgrade."""

from alembic import op
import sqlalchemy as sa

revision, down_revision, branch_labels, depends_on = "next", "{head}", None, None


def upgrade() -> None:
    op.create_table("made_by_the_next_version", sa.Column("id", sa.Integer, primary_key=True))


def downgrade() -> None:
    op.drop_table("made_by_the_next_version")
'''


def main() -> None:
    if why := missing():
        print(f"compose-test skipped: {why}")
        return
    folder = Path(tempfile.mkdtemp(prefix="cliprd-compose-"))
    stack = Stack(folder / "clone", PROJECT)
    try:
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout=5")  # of a test that was killed
        fresh_clone(stack)
        job_id = small_job(stack)
        lost_worker(stack)
        down_and_up(stack, job_id)
        upgrade(stack, job_id)
        backup_and_restore(stack, job_id)
    except BaseException:
        subprocess.run(["docker", "compose", "logs", "--tail=60"], cwd=stack.folder, env=stack.environment, check=False)
        raise
    finally:
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout=5")
        for image in ("cliprd-service", "cliprd-worker"):
            for tag in (PROJECT, f"{PROJECT}-next"):
                subprocess.run(["docker", "image", "rm", f"{image}:{tag}"], capture_output=True, check=False)
        shutil.rmtree(folder)
    print("compose-test passed")


def missing() -> str | None:
    """What the machine lacks for this test; None: nothing."""
    for command, what in (
        (["docker", "info"], "no Docker engine answers"),
        (["docker", "compose", "version"], "`docker compose` is not installed"),
        (["curl", "--version"], "curl is not installed"),
    ):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True, check=False).returncode:
            return what
    return None


def fresh_clone(stack: Stack) -> None:
    """Nothing edited: it builds, starts, is healthy, hardened, and asks for a key."""
    with step("build both images (torch comes from the cache where it was built before)"):
        stack.compose("build", "--quiet")
    for image in ("cliprd-service", "cliprd-worker"):
        size = int(stack.run("docker", "image", "inspect", "--format={{.Size}}", f"{image}:{stack.tag}"))
        print(f"  {image}: {size / 1e6:,.0f} MB")
    with step("docker compose up, everything healthy, from empty volumes"):
        stack.up()
    check(stack.status("/readyz") == 200, "/readyz needs no key")
    check(stack.status("/jobs") == 401, "without a key, a request over the bridge must be refused")
    for service in ("postgres", "redis", "api", "worker"):
        check_hardened(stack, service)
    is_read_only = stack.compose("exec", "-T", "worker", "sh", "-c", "touch /data/examples/x 2>/dev/null && echo written || echo refused")
    check(is_read_only.strip() == "refused", "the data must be mounted read-only")
    stack.key = stack.compose("exec", "-T", "api", "cliprd", "keys", "create", "--scope=admin", "--name=test").removesuffix("\n")
    check(stack.key.startswith("cliprd_") and not set(stack.key) & set(" \n"), "`keys create` must print the key alone")
    check(stack.get("/jobs")["jobs"] == [], "the key must open the service")


def check_hardened(stack: Stack, service: str) -> None:
    [container] = stack.containers(service)
    [found] = json.loads(stack.run("docker", "inspect", container))
    host = found["HostConfig"]
    check(stack.compose("exec", "-T", service, "id", "-u").strip() not in ("", "0"), f"{service} runs as root")
    check(host["ReadonlyRootfs"] and host["Init"] and host["CapDrop"] == ["ALL"], f"{service} must be hardened: {host}")
    check("no-new-privileges:true" in host["SecurityOpt"], f"{service} may gain privileges")
    check(host["RestartPolicy"]["Name"] == "unless-stopped", f"{service} is not restarted")
    check(host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}, f"the logs of {service} are not rotated")
    check(host["Memory"] > 0 and host["PidsLimit"] > 0, f"{service} has no limits")
    grace = dict(one.split("=", 1) for one in found["Config"]["Env"]).get("CLIPRD_GRACE_SECONDS", "0")
    check(found["Config"]["StopTimeout"] > float(grace), f"{service} is killed before its grace period ends")
    addresses = {one["HostIp"] for ports in found["NetworkSettings"]["Ports"].values() for one in ports or ()}
    check(addresses == ({"127.0.0.1"} if service == "api" else set()), f"{service} is published on {addresses}")
    check(
        not any("password" in line.lower() and "_FILE=" not in line for line in found["Config"]["Env"]), f"{service} has a password in Env"
    )


def small_job(stack: Stack) -> str:
    """Two workers and a `.env`; a job from its submission to a student that open_clip loads."""
    (stack.folder / ".env").write_text(SHORT_LEASES)
    with step("docker compose up with a .env and two workers"):
        stack.up(workers=2)
    check(len(stack.containers("worker")) == 2, "there must be two workers")
    with step("a small job by curl, from its submission to its end"):
        job_id = stack.submit(epochs=1, global_batch_size=64)
        eventually(lambda: stack.get(f"/jobs/{job_id}/metrics?names=train/loss")["series"] or None, "metrics are there while it runs")
        stack.succeeded(job_id)
    with step("its student, downloaded and loaded by open_clip"):
        student = stack.folder / "student"
        student.mkdir()
        for artifact in stack.get(f"/jobs/{job_id}/artifacts")["artifacts"]:
            if artifact["group"] == "export":
                stack.curl(artifact["href"], "--output", str(student / artifact["name"]))
        code = f"import open_clip; open_clip.create_model_and_transforms('local-dir:{student}')"
        stack.run(sys.executable, "-c", code)
    return job_id


def lost_worker(stack: Stack) -> None:
    """The worker that has the job is killed; then PostgreSQL and Redis restart under the other."""
    with step("a longer job, and its worker killed after its first checkpoint"):
        job_id = stack.submit(**LONG)
        eventually(lambda: checkpoints(stack, job_id) or None, "a checkpoint is mirrored")
        first = stack.get(f"/jobs/{job_id}")["worker"]
        [killed] = [one for one in stack.containers("worker") if one.startswith(first.partition(":")[0])]
        stack.run("docker", "kill", killed)
    with step("the other worker goes on with it"):
        job = stack.wait(job_id, "the other worker has it", lambda job: job["worker"] != first and (job["progress"] or {}).get("step", 0))
        check(job["attempt"] == 2, f"the second attempt runs, not {job['attempt']}")
        goes_on(stack, job_id, from_step=job["progress"]["step"])
    for service in ("postgres", "redis"):
        with step(f"docker compose restart {service}, and the job goes on"):
            before = stack.get(f"/jobs/{job_id}")["progress"]["step"]
            stack.compose("restart", service)
            eventually(lambda: stack.status("/readyz") == 200 or None, "the API is ready again")
            goes_on(stack, job_id, from_step=before)
    with step("the job's end"):
        job = stack.succeeded(job_id)
        check(job["attempt"] == 2, f"restarts must not cost attempts, but it took {job['attempt']}")


def checkpoints(stack: Stack, job_id: str) -> list[str]:
    return [one["group"] for one in stack.get(f"/jobs/{job_id}/artifacts")["artifacts"] if one["kind"] == "checkpoint"]


def goes_on(stack: Stack, job_id: str, *, from_step: int) -> None:
    stack.wait(job_id, "the job makes steps", lambda job: (job["progress"] or {}).get("step", 0) > from_step or job["state"] == "succeeded")


def everything(stack: Stack) -> list[tuple[str, str, str]]:
    """All artifacts of finished jobs, with the SHA-256 of what is downloaded."""
    found = []
    for artifact in stack.get("/artifacts")["artifacts"]:
        if artifact["kind"] != "checkpoint":
            target = stack.folder / "bytes"
            stack.curl(artifact["href"], "--output", str(target))
            digest = stack.run("sha256sum", str(target)).split()[0]
            check(digest == artifact["sha256"], f"the bytes of artifact {artifact['id']} are others")
            found.append((artifact["job_id"], artifact["name"], digest))
    return sorted(found)


def down_and_up(stack: Stack, job_id: str) -> None:
    """Containers go and come; a running job saves a checkpoint and goes on, and everything is still there."""
    before = everything(stack)
    running = stack.submit(**LONG)
    job = stack.wait(running, "the job runs", lambda job: (job["progress"] or {}).get("step", 0) >= 3)
    with step("docker compose down in the middle of a job"):
        started = time.monotonic()
        stack.compose("down")
        check(time.monotonic() - started < 180, "it must end before Docker's patience does")
    with step("docker compose up again"):
        stack.up(workers=2)
    check(everything(stack) == before, "all models must still be there")
    check(stack.get(f"/jobs/{job_id}")["state"] == "succeeded", "the finished job must still be there")
    with step("the job goes on from its last checkpoint and ends"):
        stack.wait(
            running,
            "it runs again",
            lambda now: now["state"] == "running" and (now["progress"] or {}).get("step", 0) > job["progress"]["step"],
        )
        log = stack.curl(f"/jobs/{running}/log")
        check("resuming at step" in log, f"it must resume from a checkpoint:\n{log}")
        stack.succeeded(running)


def upgrade(stack: Stack, job_id: str) -> None:
    """Images of the next version, with a migration more, over the volumes of this one, while a job runs."""
    before = everything(stack)
    running = stack.submit(**LONG)
    stack.wait(running, "the job runs", lambda job: (job["progress"] or {}).get("step", 0) >= 3)
    head = stack.sql("SELECT version_num FROM alembic_version")
    versions = stack.folder / "service/store/migrations/versions"
    (versions / "v9999_next.py").write_text(NEW_MIGRATION.format(head=head))
    stack.tag = f"{PROJECT}-next"
    with step("build the next version (the source changed, torch did not)"):
        stack.compose("build", "--quiet")
    with step("docker compose up with the next version, in the middle of a job"):
        stack.up(workers=2)
    check(stack.sql("SELECT version_num FROM alembic_version") == "next", "the database must have the next version's schema")
    check(everything(stack) == before, "all models must still be there")
    with step("the job goes on and ends"):
        job = stack.succeeded(running)
        check(job["state"] == "succeeded" and stack.get(f"/jobs/{job_id}")["state"] == "succeeded", "both jobs must be there")


def backup_and_restore(stack: Stack, job_id: str) -> None:
    """Everything is deleted and comes back from the two files of a backup, the API key included, and a running job goes on."""
    before = everything(stack)
    backup = str(stack.folder.parent / "backup")
    running = stack.submit(**LONG)
    with step("a job, until its first checkpoint is mirrored"):
        eventually(lambda: checkpoints(stack, running) or None, "a checkpoint is mirrored")
    with step("back up in the middle of it"):
        print(stack.run("scripts/compose_backup.sh", backup).strip().replace("\n", ", "), end=" … ")
    stack.compose("down", "--volumes", "--timeout=30")
    with step("restore into empty volumes"):
        stack.run("scripts/compose_restore.sh", backup)
    check(everything(stack) == before, "all models must be back")
    check(stack.get(f"/jobs/{job_id}/metrics?names=train/loss")["series"] != {}, "the metrics must be back")
    with step("the job goes on from its checkpoint"):
        eventually(lambda: "resuming at step" in stack.curl(f"/jobs/{running}/log") or None, "it resumes")
        goes_on(stack, running, from_step=stack.get(f"/jobs/{running}")["progress"]["step"])


if __name__ == "__main__":
    main()
