"""A trainer without torch that obeys the run directory's contract, for tests of what surrounds training.

    python tests/fake_trainer.py RUN/spec.json

The spec's labels steer it: `steps` and `step_seconds`; `error` (an ErrorReason to end with), `crash` (`kill`: SIGKILL itself;
`exit`: exit code 3 without a word), `best` (steps, joined by `-`, that are the best so far when they are saved), `deaf` (ignores
SIGTERM), `children` (processes it starts that outlive it unless killed), `holds_at` (steps, joined by `-`, past each of which the
first attempt does not go before `go_on_file` lies in its run directory: who stops it there, or waits for something, is in time).
It checkpoints every 5 steps, resumes from its newest checkpoint, and on SIGTERM checkpoints and exits with EXIT_CODE_STOPPED.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from cliprd_core.retention import BestCheckpoint
from cliprd_core.run_dir import (
    ATTEMPT_VARIABLE,
    BEST_FILE,
    CHECKPOINT_MARKER,
    ERROR_FILE,
    EVALUATIONS_FILE,
    EXIT_CODE_STOPPED,
    EXPORT_DIR,
    METRICS_FILE,
    RESULT_FILE,
    CheckpointFile,
    CheckpointMarker,
    ErrorReason,
    ErrorRecord,
    EvaluationRecord,
    MetricsRecord,
    Progress,
    ResultRecord,
    append_record,
    checkpoint_dir,
    complete_checkpoints,
    write_atomically,
)

CHECKPOINT_EVERY_STEPS = 5
PAIRS_PER_STEP = 8
PR_SET_PDEATHSIG = 1
WEIGHTS = b"weights of a fake student"

is_stopping = False


def stop(_signal: int, _frame: FrameType | None) -> None:
    global is_stopping  # noqa: PLW0603
    is_stopping = True


def save(run: Path, step: int) -> None:
    folder = checkpoint_dir(run, step)
    if (folder / CHECKPOINT_MARKER).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"step": step}).encode()
    (folder / "state.json").write_bytes(content)
    file = CheckpointFile(name="state.json", num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    write_atomically(folder / CHECKPOINT_MARKER, CheckpointMarker(step=step, time=time.time(), files=[file]).model_dump_json())


def progress(step: int, num_steps: int, step_seconds: float) -> Progress:
    speed = PAIRS_PER_STEP / max(step_seconds, 1e-3)
    eta = (num_steps - step) * step_seconds
    seen = step * PAIRS_PER_STEP
    return Progress(step=step, num_steps=num_steps, epoch=step / num_steps, samples_seen=seen, samples_per_second=speed, eta_seconds=eta)


def finish(run: Path, attempt: int, num_steps: int, started: float) -> None:
    record = EvaluationRecord(
        attempt=attempt,
        step=num_steps,
        epoch=1.0,
        time=time.time(),
        task="zero_shot",
        dataset="fake",
        num_samples=10,
        metrics={"zero_shot_top1": 0.5},
        chance={"zero_shot_top1": 0.1},
    )
    append_record(run / EVALUATIONS_FILE, record)
    export = run / EXPORT_DIR
    export.mkdir(exist_ok=True)
    (export / "open_clip_config.json").write_text('{"model_cfg": {}}')
    (export / "open_clip_model.safetensors").write_bytes(WEIGHTS)
    result = ResultRecord(
        step=num_steps,
        samples_seen=num_steps * PAIRS_PER_STEP,
        num_student_parameters=42,
        num_teacher_parameters=None,
        num_corrupt_samples=0,
        train_seconds=time.time() - started,
        export_files=["open_clip_config.json", "open_clip_model.safetensors"],
        export_sha256={"open_clip_model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()},
    )
    write_atomically(run / RESULT_FILE, result.model_dump_json())


def misbehave(run: Path, labels: dict[str, str]) -> None:
    if "error" in labels:
        error = ErrorRecord(reason=ErrorReason(labels["error"]), message="the fake trainer was told to fail", detail="Traceback …")
        write_atomically(run / ERROR_FILE, error.model_dump_json())
        sys.exit(1)
    if labels.get("crash") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if labels.get("crash") == "exit":
        print("the last words of the fake trainer", flush=True)
        sys.exit(3)


def go_on_file(run: Path, step: int) -> Path:
    return run / f"go-on-{step}"


def is_held(run: Path, attempt: int, step: int, labels: dict[str, str]) -> bool:
    return attempt == 1 and str(step) in labels.get("holds_at", "").split("-") and not go_on_file(run, step).exists()


def train(run: Path, labels: dict[str, str]) -> None:
    attempt = int(os.environ[ATTEMPT_VARIABLE])
    num_steps, step_seconds = int(labels.get("steps", "10")), float(labels.get("step_seconds", "0.01"))
    saved = complete_checkpoints(run)
    step = json.loads((saved[-1] / "state.json").read_text())["step"] if saved else 0
    print(f"attempt {attempt} starts at step {step}", flush=True)
    for _ in range(int(labels.get("children", "0"))):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    started = time.time()
    while step < num_steps:
        if is_stopping and "deaf" not in labels:
            save(run, step)
            sys.exit(EXIT_CODE_STOPPED)
        time.sleep(step_seconds)
        if is_held(run, attempt, step, labels):
            continue
        step += 1
        record = MetricsRecord(
            attempt=attempt, step=step, time=time.time(), progress=progress(step, num_steps, step_seconds), values={"train/loss": 1 / step}
        )
        append_record(run / METRICS_FILE, record)
        if step % CHECKPOINT_EVERY_STEPS == 0:
            save(run, step)
            if str(step) in labels.get("best", "").split("-"):
                write_atomically(run / BEST_FILE, BestCheckpoint(step=step, value=step / 100).model_dump_json())
        if step == num_steps // 2:
            misbehave(run, labels)
    finish(run, attempt, num_steps, started)


def main() -> None:
    if os.environ.get("CLIPRD_DIE_WITH_PARENT") == "1":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGTERM, stop)
    spec_path = Path(sys.argv[1])
    train(spec_path.parent, json.loads(spec_path.read_text())["labels"])


if __name__ == "__main__":
    main()
