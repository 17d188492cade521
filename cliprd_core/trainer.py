"""The training loop: steps, records, evaluations, checkpoints, and how a run ends.

What is built before the first step is in `run_setup.py`. Every rank runs this code; rank 0 alone writes. A run may end at any moment, by
SIGTERM (it saves and can be resumed) or by SIGKILL (it resumes from its newest checkpoint); on the CPU the resumed run's weights equal
those of one never interrupted, bit for bit (with as many threads).
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from cliprd_core import distributed
from cliprd_core.checkpoint import prune_checkpoints, save_checkpoint
from cliprd_core.compiled_towers import uncompiled
from cliprd_core.data.batch import Batch
from cliprd_core.divergence import GRAD_NORM, LOSS, TERM_PREFIX
from cliprd_core.evaluation.run import evaluate, evaluated_sets
from cliprd_core.export import export_model
from cliprd_core.models import ClipModel, num_parameters
from cliprd_core.optim import lr_at, set_learning_rate
from cliprd_core.run_dir import EXPORT_DIR, RESULT_FILE, EvaluationRecord, ResultRecord, cache_dir, write_atomically
from cliprd_core.run_setup import Run, prepare_run
from cliprd_core.spec import JobSpec
from cliprd_core.step_module import StepLosses
from cliprd_core.stopping import StopRequest

logger = logging.getLogger(__name__)

MAX_LOG_LOGIT_SCALE = math.log(100)
"""CLIP's bound on its learned temperature (arXiv 2103.00020, section 2.5)."""


class Outcome(Enum):
    """How `train` ended, when it ended well."""

    FINISHED = "finished"
    """All steps done, evaluated and exported; result.json is written."""
    STOPPED = "stopped"
    """Asked to stop; a checkpoint holds everything."""


@dataclass(frozen=True)
class StepOutput:
    """What one step measured, still on the device: reading it waits for the step to finish."""

    names: tuple[str, ...]  # of the numbers, the same in every step
    numbers: Tensor  # (numbers,), equal on every rank
    learning_rate: float


def train(spec: JobSpec, run_dir: Path, stop: StopRequest) -> Outcome:
    """Run, or resume, the job in `run_dir` until it is done or `stop` is requested.

    Joins the process group that the environment describes, and leaves it at the end unless something is raised.

    Raises:
        InvalidSpecError: the spec cannot be run; the message names the field and the remedy.
        InvalidDataError: the training pairs cannot be read.
        DivergedError: the loss or gradient became NaN or infinite; no checkpoint holds such weights.
    """
    started = time.monotonic()
    run = prepare_run(spec, run_dir)
    is_done = _train_epochs(run, stop)
    run.loader.close()
    run.teacher_features.close()
    num_corrupt_samples = len(run.control.union(run.loader.corrupt_indices))
    if is_done and distributed.is_main():
        _finish(run, started, num_corrupt_samples)
    run.control.wait()  # rank 0 may still be saving; a launcher kills what is left when one process ends
    # Not after an exception: closing the connections would make the other ranks fail before this one has said why.
    distributed.shutdown()
    return Outcome.FINISHED if is_done else Outcome.STOPPED


def train_step(run: Run, batch: Batch, step: int) -> StepOutput:
    """One update, the one after `step` updates, from this process's share of the batch.

    It never waits for the device, except that a step which fills teacher stores waits at its end for the teachers' features.
    """
    learning_rate = lr_at(step, run.spec.training, run.num_steps)
    set_learning_rate(run.optimizer, learning_rate)
    # No random state is carried from step to step, so a resumed run draws the same dropout masks.
    torch.manual_seed(_step_seed(run.spec.training.seed, step, distributed.rank()))

    if run.passes.micro_batch_size is None:
        batch = batch.to(run.device)  # else each micro batch's images go there in their turn
    teacher_image_features, teacher_text_features = run.teacher_features.of(batch)
    losses = run.passes.forward(batch.student_pixels, batch.student_tokens, teacher_image_features, teacher_text_features)

    run.passes.backward(run.scaler.scale(losses["loss"]))
    run.scaler.unscale_(run.optimizer)
    grad_norm = _clip_gradients(run.trainable, run.spec.training.grad_clip_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    _clamp_logit_scale(run.student.model)
    run.objective.clamp_scales()
    run.teacher_features.flush()
    measured = _measured(run, losses, grad_norm)
    numbers = torch.stack([value.detach().float().to(run.device) for value in measured.values()])
    return StepOutput(tuple(measured), numbers, learning_rate)


def _clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clip in place if asked to; returns the norm there was before."""
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm)
    return grad_norm


@torch.no_grad()
def _clamp_logit_scale(student: ClipModel) -> None:
    student.logit_scale.clamp_(0.0, MAX_LOG_LOGIT_SCALE)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Distinct for every (step, rank) of a run."""
    return hash((seed, step, rank)) & 0x7FFF_FFFF_FFFF_FFFF  # a tuple of integers hashes the same in every process


def _train_epochs(run: Run, stop: StopRequest) -> bool:
    """All steps and evaluations that are left. True: done. False: asked to stop, and saved."""
    step = run.start_step
    if run.control.any(stop.requested):
        return False
    if step > 0 and step % run.num_steps_per_epoch == 0 and not run.control.any(_is_evaluated(run, step)):
        _evaluate_if_due(run, step)  # the run ended between the epoch's checkpoint and the end of its evaluation
    for epoch in range(step // run.num_steps_per_epoch, run.spec.training.epochs):
        batches = run.loader.epoch(epoch, start_step=step - epoch * run.num_steps_per_epoch)
        for batch in run.stopwatch.waiting_for(iter(batches)):
            output = train_step(run, batch, step)
            step += 1
            run.divergence.observe(output.names, output.numbers, step)
            is_stopping = run.control.any(stop.requested)
            _record_and_save(run, output, step, is_stopping=is_stopping)
            if is_stopping and step < run.num_steps:
                logger.info("stopped at step %d, as asked; a checkpoint is saved", step)
                return False
        _evaluate_if_due(run, step)
    return True


def _record_and_save(run: Run, output: StepOutput, step: int, *, is_stopping: bool) -> None:
    """Log and save where this step calls for it. Only here does the host wait for the device.

    What is saved is logged first, so that whoever reads the records never takes a run for further back than its newest checkpoint.
    """
    training = run.spec.training
    is_last = step == run.num_steps
    is_log_due = step == run.start_step + 1 or step % training.log_every_steps == 0 or is_last
    is_save_due = is_stopping or step % training.checkpoint_every_steps == 0 or _is_evaluation_due(run, step)
    if not (is_log_due or is_save_due):
        return
    run.divergence.check()
    if distributed.is_main():
        values = {**dict(zip(output.names, output.numbers.tolist(), strict=True)), "train/learning_rate": output.learning_rate}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}  # fp16 skips steps of infinite gradient
        run.metrics.training(step, finite, run.stopwatch.lap())
    if is_save_due and distributed.is_main():
        with run.stopwatch.paused():
            save_checkpoint(run.run_dir, run.state_at(step), run.parts, training.keep_checkpoints)


def _measured(run: Run, losses: StepLosses, grad_norm: Tensor) -> dict[str, Tensor]:
    """All measurements of a step by name, 0-d; `grad_norm` is the global L2 norm before clipping."""
    tensors = {LOSS: losses["total"], GRAD_NORM: grad_norm}
    tensors |= {f"{TERM_PREFIX}{name}": value for name, value in losses["terms"].items()}
    tensors |= {f"train/weighted/{name}": value for name, value in losses["weighted"].items()}
    tensors["train/logit_scale"] = run.student.model.logit_scale.detach().exp().reshape(())
    return tensors | {f"train/scale/{name}": value for name, value in run.objective.scales().items()}


def _is_evaluation_due(run: Run, step: int) -> bool:
    """After every `evaluation.every_epochs` epochs, and after the last step."""
    return step == run.num_steps or step % (run.num_steps_per_epoch * run.spec.evaluation.every_epochs) == 0


def _is_evaluated(run: Run, step: int) -> bool:
    """Whether every set's evaluation at `step` is on record."""
    return run.metrics.has_evaluations(step, evaluated_sets(run.spec.evaluation, has_validation=run.validation is not None))


def _evaluate_if_due(run: Run, step: int) -> None:
    """All ranks evaluate the student as it will be deployed, each a share; rank 0 adds up and records."""
    if not _is_evaluation_due(run, step):
        return
    with run.stopwatch.paused():
        distributed.broadcast_buffers(run.student.model)
        with uncompiled():
            records = _evaluate(run, step)
        if distributed.is_main():
            run.metrics.evaluation(records, step)
            if run.best.observe(records):
                _keep_best(run)
        run.control.wait()


def _keep_best(run: Run) -> None:
    """Say which checkpoint is the best now, and remove the one that was, if nothing else keeps it. Steps that are evaluated are saved."""
    run.best.write(run.run_dir)
    prune_checkpoints(run.run_dir, run.spec.training.keep_checkpoints, run.best.checkpoint)


def _evaluate(run: Run, step: int) -> list[EvaluationRecord]:
    student = run.student
    results = evaluate(
        student.model,
        preprocess=student.preprocess,
        tokenizer=student.tokenizer,
        spec=run.spec.evaluation,
        validation=run.validation,
        device=run.device,
        precision=run.spec.training.precision,
        cache_dir=cache_dir(run.run_dir),
        group=run.control,
    )
    return [
        EvaluationRecord(
            attempt=run.attempt,
            step=step,
            epoch=step / run.num_steps_per_epoch,
            time=time.time(),
            task=result.task,
            dataset=result.dataset,
            num_samples=result.num_samples,
            metrics=result.metrics,
            chance=result.chance,
        )
        for result in results
    ]


def _finish(run: Run, started: float, num_corrupt_samples: int) -> None:
    """Export the student and write result.json, the last thing a run does."""
    exported = export_model(run.student, run.run_dir / EXPORT_DIR)
    result = ResultRecord(
        step=run.num_steps,
        samples_seen=run.num_steps * run.spec.training.global_batch_size,
        num_student_parameters=num_parameters(run.student.model),
        num_teacher_parameters=sum(num_parameters(teacher.model) for teacher in run.teachers) or None,
        num_corrupt_samples=num_corrupt_samples,
        train_seconds=time.monotonic() - started,
        export_files=list(exported),
        export_sha256=exported,
    )
    write_atomically(run.run_dir / RESULT_FILE, result.model_dump_json(indent=1))
    logger.info("finished: %s is ready for open_clip as `local-dir:%s`", EXPORT_DIR, run.run_dir / EXPORT_DIR)
