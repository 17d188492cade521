"""Whole training runs, small and real: exact resume after SIGKILL, stopping by SIGTERM, several processes, precisions, failures.

Where signals matter the run is a process of its own; elsewhere `train.main` is called in this one, which saves the start.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from cliprd_core import precision, train, trainer
from cliprd_core.checkpoint import TRAINING_FILE, read_state
from cliprd_core.data.batch import Batch
from cliprd_core.models import load_student
from cliprd_core.objective import Objective, ObjectiveOutput
from cliprd_core.retention import BestCheckpoint
from cliprd_core.run_dir import (
    BEST_FILE,
    CHECKPOINTS_DIR,
    ERROR_FILE,
    EVALUATIONS_FILE,
    EXIT_CODE_STOPPED,
    EXPORT_DIR,
    METRICS_FILE,
    RESULT_FILE,
    SPEC_FILE,
    ErrorReason,
    ErrorRecord,
    EvaluationRecord,
    ResultRecord,
    complete_checkpoints,
    read_record,
    read_records,
    step_of,
)
from cliprd_core.run_setup import Run
from cliprd_core.spec import JobSpec, StudentSpec
from cliprd_core.stopping import StopRequest
from tests.golden.make_loss_curve import GOLDEN_FILE, golden_spec, loss_curve
from tests.tiny import tiny_config, tiny_spec, write_teacher
from tests.training_runs import (
    NUM_STEPS,
    TIMEOUT_SECONDS,
    WEIGHTS,
    Inputs,
    assert_same_weights,
    losses,
    make_inputs,
    metrics,
    run_here,
    start,
    wait_for_step,
)

EMOJI_RETRIEVAL = Path(__file__).parents[2] / "examples" / "emoji" / "wds" / "emoji_twemoji_retrieval"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def straight(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without randomness in its steps. Read only: copy it to change it."""
    run = tmp_path_factory.mktemp("straight")
    assert run_here(run, inputs.spec(data={"validation": [inputs.source]})) == 0
    return run


def failure(run: Path, spec: JobSpec) -> ErrorRecord:
    assert run_here(run, spec) == 1
    error = read_record(run / ERROR_FILE, ErrorRecord)
    assert error is not None
    assert not (run / RESULT_FILE).exists()
    return error


def test_a_run_leaves_everything_behind(straight: Path, inputs: Inputs) -> None:
    training = [record for record in metrics(straight) if "train/loss" in record.values]
    assert [record.step for record in training] == list(range(1, NUM_STEPS + 1))
    first, last = training[0], training[-1]
    terms = {"task", "fd", "icl", "hrd", "vrd", "xrd"}
    for kind in ("term", "weighted"):
        assert terms <= {name.removeprefix(f"train/{kind}/") for name in last.values if name.startswith(f"train/{kind}/")}
    for name in ("grad_norm", "learning_rate", "samples_per_second", "data_wait_share", "logit_scale", "scale/cross_scale"):
        assert f"train/{name}" in last.values
    assert last.values["train/loss"] == pytest.approx(sum(last.values[f"train/weighted/{name}"] for name in terms), rel=1e-5)
    assert last.values["train/loss"] < first.values["train/loss"]
    assert (last.progress.num_steps, last.progress.epoch, last.progress.samples_seen) == (NUM_STEPS, 2.0, 64)
    assert (first.progress.eta_seconds, last.progress.eta_seconds) == (None, 0.0)
    assert last.values["train/scale/image_scale"] != pytest.approx(math.log(1 / 0.07), abs=1e-5), "the objective's scales are learned"

    evaluations = [record for record, _ in read_records(straight / EVALUATIONS_FILE, EvaluationRecord)]
    assert [(record.step, record.epoch, record.task) for record in evaluations] == [(4, 1.0, "validation"), (8, 2.0, "validation")]
    assert metrics(straight)[-1].values["evaluation/validation/image_to_text_R@1"] == evaluations[-1].metrics["image_to_text_R@1"]

    result = read_record(straight / RESULT_FILE, ResultRecord)
    assert result is not None
    assert (result.step, result.samples_seen, result.num_corrupt_samples) == (NUM_STEPS, 64, 0)
    assert (result.num_student_parameters, result.num_teacher_parameters) == (1_615_937, 2_445_025)
    assert [folder.name for folder in complete_checkpoints(straight)] == ["step-0000000006", "step-0000000008"]
    assert not (straight / ERROR_FILE).exists()


def test_export_loads_in_plain_open_clip_with_the_trained_weights(straight: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{straight / EXPORT_DIR}")
    trained = load_file(complete_checkpoints(straight)[-1] / "student.safetensors")
    exported = model.state_dict()
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    initial = load_student(StudentSpec(config=tiny_config()), seed=0).model.state_dict()
    assert not torch.equal(initial["text_projection"], trained["text_projection"])


def test_killed_at_any_step_it_ends_with_the_same_weights(inputs: Inputs, tmp_path: Path) -> None:
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    process = start(reference, inputs.random_spec())
    assert process.wait(TIMEOUT_SECONDS) == 0, (reference / "log.txt").read_text()
    steps = sorted(random.Random(time.time_ns()).sample(range(1, 10), k=2))  # of 12
    for attempt, step in enumerate(steps, start=1):
        process = start(killed, inputs.random_spec(), attempt=attempt, held_step=step + 2)
        wait_for_step(killed, step, process, attempt=attempt)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT_SECONDS)
    process = start(killed, inputs.random_spec(), attempt=3)
    assert process.wait(TIMEOUT_SECONDS) == 0, (killed / "log.txt").read_text()
    assert losses(killed) == losses(reference), f"killed at steps {steps}"
    assert_same_weights(killed, reference)
    recorded = [(record.step, record.metrics) for record, _ in read_records(killed / EVALUATIONS_FILE, EvaluationRecord)]
    expected = [(record.step, record.metrics) for record, _ in read_records(reference / EVALUATIONS_FILE, EvaluationRecord)]
    assert dict(recorded) == dict(expected)
    for attempt in (2, 3):
        first_step = next(record.step for record in metrics(killed) if record.attempt == attempt)
        assert first_step > steps[attempt - 2] - 3, "it went on from a checkpoint, not from the start"


def test_sigterm_saves_and_the_run_goes_on_where_it_stopped(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    spec = inputs.spec(training={"checkpoint_every_steps": 1000, "epochs": 100})  # long enough not to finish before the signal
    ends = [0]
    for attempt in (1, 2):
        process = start(run, spec, attempt=attempt, held_step=ends[-1] + 4)
        wait_for_step(run, ends[-1] + 2, process, attempt=attempt)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_SECONDS) == EXIT_CODE_STOPPED, (run / "log.txt").read_text()
        ends.append(metrics(run)[-1].step)
        assert complete_checkpoints(run)[-1].name == f"step-{ends[-1]:010d}", "the step was finished, then saved"
        assert [record.step for record in metrics(run) if record.attempt == attempt] == list(range(ends[-2] + 1, ends[-1] + 1))
        assert not (run / RESULT_FILE).exists()
        assert not (run / ERROR_FILE).exists()


@pytest.mark.parametrize("stops_after", [None, 3])
def test_progress_is_never_behind_the_newest_checkpoint(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int | None
) -> None:
    stop, one_step = StopRequest(), trainer.train_step

    def stopping(run: Run, batch: Batch, step: int) -> trainer.StepOutput:
        stop.requested = step + 1 == stops_after
        return one_step(run, batch, step)

    monkeypatch.setattr(trainer, "train_step", stopping)
    training = {"epochs": 3, "log_every_steps": 1000, "checkpoint_every_steps": 1000 if stops_after else 5}
    trainer.train(inputs.spec(training=training, evaluation={"every_epochs": 10}), tmp_path, stop)
    assert [record.step for record in metrics(tmp_path)] == ([1, 3] if stops_after else [1, 5, 10, 12])
    assert [step_of(folder) for folder in complete_checkpoints(tmp_path)] == ([3] if stops_after else [10, 12])


@pytest.mark.parametrize("combination", ["concatenate", "average"])
def test_several_teachers_teach_and_a_resumed_run_has_them_all(inputs: Inputs, tmp_path: Path, combination: str) -> None:
    other = write_teacher(tmp_path / "other", tiny_config(width=32, embed_dim=64, image_size=24), seed=7)
    changes: dict[str, Any] = {"objective": {"teacher_combination": combination}, "training": {"micro_batch_size": 3}, "recipe": "clip_rd"}
    spec = tiny_spec(inputs.shards, teachers=[{"model": inputs.teacher}, {"model": other}], **changes)
    assert run_here(tmp_path / "straight", spec) == 0
    curve = losses(tmp_path / "straight")
    assert curve[NUM_STEPS] < curve[1]
    result = read_record(tmp_path / "straight" / RESULT_FILE, ResultRecord)
    assert result is not None
    assert result.num_teacher_parameters is not None
    assert result.num_teacher_parameters > 2 * 1_500_000
    process = start(tmp_path / "killed", spec, held_step=NUM_STEPS)
    wait_for_step(tmp_path / "killed", 5, process)
    process.kill()
    process.wait()
    assert run_here(tmp_path / "killed", spec) == 0
    assert_same_weights(tmp_path / "killed", tmp_path / "straight")
    (tmp_path / "killed" / RESULT_FILE).unlink()
    assert "the teachers' weights" in failure(tmp_path / "killed", inputs.spec(**changes)).message


def test_two_processes_follow_the_curve_of_one(inputs: Inputs, straight: Path, tmp_path: Path) -> None:
    """Tolerance: two processes add the same fp32 numbers in another order, and AdamW's first steps amplify that; 1e-4 relative.

    The run is stopped half-way and resumed by a single process, so it also shows that checkpoints don't depend on their number.
    """
    spec = inputs.spec(data={"validation": [inputs.source]}, training={"checkpoint_every_steps": 1000})
    process = start(tmp_path / "run", spec, num_processes=2, held_step=NUM_STEPS - 1)
    wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    process.wait(TIMEOUT_SECONDS)
    log = (tmp_path / "run" / "log.txt").read_text()
    stopped = [record for record in metrics(tmp_path / "run") if "train/loss" in record.values]
    assert [record.step for record in stopped] == list(range(1, len(stopped) + 1)), "one process alone writes"
    assert complete_checkpoints(tmp_path / "run")[-1].name == f"step-{len(stopped):010d}", log
    assert not (tmp_path / "run" / ERROR_FILE).exists(), log
    assert run_here(tmp_path / "run", spec) == 0
    for step, loss in losses(straight).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, rel=1e-4), f"step {step}"
    by_step = {record.step: record.values["train/grad_norm"] for record in stopped}
    for record in metrics(straight):
        if record.step in by_step and "train/grad_norm" in record.values:
            assert by_step[record.step] == pytest.approx(record.values["train/grad_norm"], rel=1e-3), f"step {record.step}"


def test_golden_loss_curve(tmp_path: Path) -> None:
    """Change the file on purpose only: `python -m tests.golden.make_loss_curve`. Other CPUs differ by about 1e-6."""
    assert run_here(tmp_path, golden_spec(tmp_path)) == 0
    golden, curve = json.loads(GOLDEN_FILE.read_text()), loss_curve(tmp_path)
    assert len(golden) == len(curve) == 12
    for step, (expected, actual) in enumerate(zip(golden, curve, strict=True), start=1):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6), f"step {step}"


def test_damaged_checkpoint_costs_only_the_steps_since_the_one_before(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / EXPORT_DIR)
    (run / METRICS_FILE).unlink()
    newest = complete_checkpoints(run)[-1] / "training.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert train.main([str(run / SPEC_FILE)]) == 0
    assert sorted(losses(run)) == [7, 8]
    assert_same_weights(run, straight)


def test_the_best_checkpoint_is_kept_and_known_to_a_run_that_resumes_elsewhere(inputs: Inputs, tmp_path: Path) -> None:
    metric = "image_to_text_R@1"
    keep = {"newest": 1, "every_steps": 6, "best": f"validation/{metric}"}
    training = {"epochs": 4, "checkpoint_every_steps": 3, "keep_checkpoints": keep}
    spec = inputs.spec(data={"validation": [inputs.source]}, training=training)
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert run_here(run, spec) == 0
    evaluations = [record for record, _ in read_records(run / EVALUATIONS_FILE, EvaluationRecord)]
    values = {record.step: record.metrics[metric] for record in evaluations}
    best = BestCheckpoint(step=max(values, key=lambda step: (values[step], -step)), value=max(values.values()))
    assert read_record(run / BEST_FILE, BestCheckpoint) == best
    assert {step_of(folder) for folder in complete_checkpoints(run)} == {6, 12, 16, best.step}

    # Only a checkpoint comes along, of the middle of an epoch, as from the artifact store.
    shutil.copytree(run / CHECKPOINTS_DIR / "step-0000000006", elsewhere / CHECKPOINTS_DIR / "step-0000000006")
    assert run_here(elsewhere, spec) == 0
    assert_same_weights(elsewhere, run)
    saved = read_state(complete_checkpoints(elsewhere)[-1]).best
    assert saved == read_state(complete_checkpoints(run)[-1]).best
    before = read_state(elsewhere / CHECKPOINTS_DIR / "step-0000000006").best
    assert before == BestCheckpoint(step=4, value=values[4])
    assert read_record(elsewhere / BEST_FILE, BestCheckpoint) == best


def test_an_interrupted_evaluation_is_made_whole_and_the_best_is_told(inputs: Inputs, tmp_path: Path) -> None:
    metric = "image_to_text_R@1"
    spec = inputs.spec(
        data={"validation": [inputs.source]},
        evaluation={"retrieval": [str(EMOJI_RETRIEVAL)], "every_epochs": 2},
        training={"keep_checkpoints": {"best": f"validation/{metric}"}},
    )
    assert run_here(tmp_path, spec) == 0
    first, second = (record for record, _ in read_records(tmp_path / EVALUATIONS_FILE, EvaluationRecord))
    assert (first.task, second.task) == ("retrieval", "validation")
    best = BestCheckpoint(step=NUM_STEPS, value=second.metrics[metric])

    for records_left in ([first], [first, second]):  # killed between the two, or before it was told which checkpoint is the best
        (tmp_path / EVALUATIONS_FILE).write_text("".join(f"{record.model_dump_json()}\n" for record in records_left))
        for name in (RESULT_FILE, BEST_FILE):
            (tmp_path / name).unlink()
        assert train.main([str(tmp_path / SPEC_FILE)]) == 0
        found = [record for record, _ in read_records(tmp_path / EVALUATIONS_FILE, EvaluationRecord)]
        assert {(record.step, record.task) for record in found} == {(NUM_STEPS, "retrieval"), (NUM_STEPS, "validation")}
        assert read_record(tmp_path / BEST_FILE, BestCheckpoint) == best


def test_a_run_that_only_lacks_its_export_trains_nothing(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / EXPORT_DIR)
    (run / RESULT_FILE).unlink()
    before = [(run / name).read_bytes() for name in (METRICS_FILE, EVALUATIONS_FILE)]
    assert train.main([str(run / SPEC_FILE)]) == 0
    assert [(run / name).read_bytes() for name in (METRICS_FILE, EVALUATIONS_FILE)] == before
    assert_same_weights(run, straight)
    assert (run / RESULT_FILE).exists()


def test_resuming_under_another_spec_is_refused(straight: Path, inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    error = failure(run, inputs.spec(objective={"fd": 1000.0}))
    assert error.reason is ErrorReason.INVALID_SPEC
    assert "`objective.fd` (2000.0 then, 1000.0 now)" in error.message


def test_bf16_trains_close_to_fp32(straight: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has 8 bits of mantissa: losses within 2 %, but not equal. (fp16 needs a GPU.)"""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)  # it is slow where it is not so, but it runs
    assert run_here(tmp_path / "run", inputs.spec(training={"precision": "bf16"})) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=0.02)
    assert losses(tmp_path / "run") != losses(straight)
    assert {value.dtype for value in load_file(tmp_path / "run" / WEIGHTS).values()} == {torch.float32}


def test_bf16_is_fp32_where_the_cpu_lacks_it(
    straight: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert run_here(tmp_path / "run", inputs.spec(training={"precision": "bf16"})) == 0
    assert losses(tmp_path / "run") == losses(straight)
    assert "this CPU has no fast bf16 arithmetic" in caplog.text


def test_plain_clip_without_a_teacher_and_gradient_clipping(inputs: Inputs, tmp_path: Path) -> None:
    spec = tiny_spec(
        inputs.shards, training={"epochs": 1, "grad_clip_norm": 0.01, "warmup_steps": 0, "log_every_steps": 3, "checkpoint_every_steps": 3}
    )
    assert run_here(tmp_path / "run", spec) == 0
    records = metrics(tmp_path / "run")
    assert [record.step for record in records] == [1, 3, 4], "the first, every third, and the last"
    assert not [name for name in records[0].values if "fd" in name or "scale/" in name]
    assert records[0].values["train/grad_norm"] > 0.01, "the norm is reported as it was before clipping"
    assert records[0].values["train/learning_rate"] == 1e-3


def test_fp32_is_fp32_though_tf32_was_allowed(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 allows it at torch's start."""
    torch.set_float32_matmul_precision("high")
    try:
        assert run_here(tmp_path / "run", inputs.spec(training={"epochs": 1})) == 0
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" in caplog.text


@pytest.mark.parametrize("num_teachers", [1, 2])
def test_records_and_checkpoints_hold_the_scales_that_the_next_step_uses(inputs: Inputs, tmp_path: Path, num_teachers: int) -> None:
    """At this learning rate exponentiated scales leave CLIP's bounds within a few steps."""
    spec = tiny_spec(
        inputs.shards,
        recipe="clip_rd",
        teachers=[{"model": inputs.teacher}] * num_teachers,
        objective={"scale_mode": "exp", "teacher_combination": "average"},
        training={"warmup_steps": 0, "learning_rate": 1.0, "checkpoint_every_steps": 1, "keep_checkpoints": {"newest": NUM_STEPS}},
    )
    assert run_here(tmp_path / "run", spec) == 0
    records = [{name: value for name, value in record.values.items() if "train/scale/" in name} for record in metrics(tmp_path / "run")]
    factors = [factor for record in records for factor in record.values()]
    assert len(factors) == NUM_STEPS * 3 * num_teachers
    assert all(0.999 < factor < 100.001 for factor in factors), factors
    assert any(factor == pytest.approx(bound) for factor in factors for bound in (1.0, 100.0)), "some are at a bound"
    for folder in complete_checkpoints(tmp_path / "run"):
        tensors = load_file(folder / TRAINING_FILE)
        scales = {name: float(tensor) for name, tensor in tensors.items() if name.startswith("objective/") and name.endswith("_scale")}
        assert len(scales) == 3 * num_teachers
        assert all(0.0 <= scale <= math.log(100) + 1e-6 for scale in scales.values()), scales


def test_diverging_names_step_and_term(inputs: Inputs, tmp_path: Path) -> None:
    state = dict(load_student(StudentSpec(config=tiny_config()), seed=0).model.state_dict())
    state["text_projection"] = torch.full_like(state["text_projection"], torch.nan)
    save_file(state, tmp_path / "broken.safetensors")
    student = {"config": tiny_config(), "pretrained": str(tmp_path / "broken.safetensors")}
    error = failure(tmp_path / "run", tiny_spec(inputs.shards, student=student))
    assert error.reason is ErrorReason.DIVERGED
    assert "loss term `task`" in error.message
    assert "at step 1" in error.message
    assert complete_checkpoints(tmp_path / "run") == [], "such weights are never saved"


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_term_that_breaks_between_two_records_is_named(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None
) -> None:
    forward, calls = Objective.forward, itertools.count(1)

    def breaking(self: Objective, **features: Any) -> ObjectiveOutput:
        output = forward(self, **features)
        if next(calls) != 3:
            return output
        terms = output.terms | {"fd": output.terms["fd"] * math.nan}
        return replace(output, loss=output.loss * math.nan, total=output.total * math.nan, terms=terms)

    monkeypatch.setattr(Objective, "forward", breaking)
    training = {"log_every_steps": 100, "checkpoint_every_steps": 100, "micro_batch_size": micro_batch_size}
    error = failure(tmp_path / "run", inputs.spec(training=training))
    assert error.reason is ErrorReason.DIVERGED
    assert error.message == "The loss term `fd` was no longer a finite number at step 3."
    assert [record.step for record in metrics(tmp_path / "run")] == [1]
    assert complete_checkpoints(tmp_path / "run") == []


def test_a_killed_loader_process_counts_as_lost_not_as_a_fault(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, inputs.spec(training={"num_data_workers": 1, "epochs": 1000, "log_every_steps": 1}))
    wait_for_step(run, 2, process)
    (loader,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(loader), signal.SIGKILL)
    assert process.wait(TIMEOUT_SECONDS) == 1, (run / "log.txt").read_text()
    error = read_record(run / ERROR_FILE, ErrorRecord)
    assert error is not None
    assert error.reason is ErrorReason.WORKER_LOST, error
    assert "loads data was killed" in error.message


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"training": {"warmup_steps": 8}}, ErrorReason.INVALID_SPEC, "`training.warmup_steps` (8) must be less than the run's 8 steps"),
        ({"training": {"global_batch_size": 64}}, ErrorReason.INVALID_SPEC, "`training.global_batch_size` is 64 but"),
        ({"student": {"config": tiny_config() | {"embed_dim": 10**12}}}, ErrorReason.OUT_OF_MEMORY, "ran out of memory"),
        ({"resources": {"device": "cuda"}}, ErrorReason.INVALID_SPEC, "torch sees no GPU"),
        ({"resources": {"device": "auto"}, "training": {"precision": "fp16"}}, ErrorReason.INVALID_SPEC, "fp16 needs a GPU"),
        ({"data": {"train": [{"type": "webdataset", "shards": "/no/such/{0..3}.tar"}]}}, ErrorReason.INVALID_DATA, "/no/such/0.tar"),
        ({"evaluation": {"zero_shot": ["/no/such/set"]}}, ErrorReason.INVALID_DATA, "/no/such/set"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these mistakes need a machine without a GPU")
def test_failures_are_typed_and_say_what_to_do(
    inputs: Inputs, tmp_path: Path, changes: dict[str, Any], reason: ErrorReason, message: str
) -> None:
    error = failure(tmp_path / "run", tiny_spec(inputs.shards, **changes))
    assert error.reason is reason
    assert message in error.message
    assert "Traceback" in error.detail


def test_invalid_spec_file_names_the_field(tmp_path: Path) -> None:
    (tmp_path / SPEC_FILE).write_text(json.dumps({"name": "x", "student": {"model": "ViT-T-16"}, "recipe": "clip", "data": {"train": []}}))
    (tmp_path / RESULT_FILE).write_text("{}")  # of an earlier attempt
    assert train.main([str(tmp_path / SPEC_FILE)]) == 1
    error = read_record(tmp_path / ERROR_FILE, ErrorRecord)
    assert error is not None
    assert error.reason is ErrorReason.INVALID_SPEC
    assert "`data.train`" in error.message
    assert not (tmp_path / RESULT_FILE).exists()


def test_a_fault_of_ours_is_internal_with_its_traceback(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("a file where a folder should be")
    error = failure(tmp_path / "run", tiny_spec(inputs.shards))
    assert error.reason is ErrorReason.INTERNAL
    assert "save_checkpoint" in error.detail
