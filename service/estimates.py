"""Memory and time of a job that does not exist yet, in words that say what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cliprd_core.memory_estimate import computes_in_half, estimate_memory
from cliprd_core.model_size import ModelSize
from cliprd_core.spec import Device, JobSpec
from service.dry_run_schemas import MemoryView, SpeedView, TimeView
from service.model_sizes import Unknown
from service.store.speeds import RecordedSpeed
from service.store.workers import WorkerState, WorkerStatus


def memory_view(spec: JobSpec, sizes: Mapping[str, ModelSize | Unknown]) -> MemoryView:
    """`sizes`: of the student and the teachers, by field."""
    unknown = [f"`{field}`: {reason}" for field, size in sizes.items() if (reason := _why_unknown(size)) is not None]
    if unknown:
        return MemoryView(
            weights_bytes=None,
            gradients_bytes=None,
            optimizer_bytes=None,
            activations_bytes=None,
            objective_bytes=None,
            total_bytes=None,
            least_bytes=None,
            assumptions=[],
            reason=f"What a model takes is not known: {'; '.join(unknown)}.",
        )
    known = {field: size for field, size in sizes.items() if isinstance(size, ModelSize)}
    estimate = estimate_memory(spec, known["student"], [known[field] for field in spec.teacher_fields])
    return MemoryView(
        weights_bytes=estimate.weights,
        gradients_bytes=estimate.gradients,
        optimizer_bytes=estimate.optimizer,
        activations_bytes=estimate.activations,
        objective_bytes=estimate.objective,
        total_bytes=estimate.total,
        least_bytes=estimate.least,
        assumptions=_memory_assumptions(spec),
        reason=None,
    )


def _why_unknown(size: ModelSize | Unknown) -> str | None:
    if isinstance(size, Unknown):
        return size.reason
    return None if size.has_activations else "its activations have not been measured"


def queue_warnings(complaint: str | None) -> list[str]:
    """`complaint`: why no worker takes the job's queue; None: one does."""
    if complaint is None:
        return []
    return [
        f"The job would wait: {complaint}. Choose a `resources.queue` that a worker takes (GET /workers lists them), or start one that"
        " takes this queue (its `CLIPRD_QUEUES`)."
    ]


def memory_warnings(spec: JobSpec, least_bytes: int | None, workers: Sequence[WorkerStatus]) -> list[str]:
    """Whether what the job surely needs is more than any GPU has that it may come to; nothing where that isn't known.

    `least_bytes`: of each process, None where it can't be told; `workers`: all there are.
    """
    takers = _takers(spec, workers)
    may_use_cpu = spec.resources.device is Device.CPU or (
        spec.resources.device is Device.AUTO and any(not worker.gpus for worker in takers)
    )
    gpus = [gpu for worker in takers for gpu in worker.gpus]
    totals = [gpu.memory_total_bytes for gpu in gpus if gpu.memory_total_bytes is not None]
    if least_bytes is None or may_use_cpu or not totals or len(totals) < len(gpus) or least_bytes <= max(totals):
        return []
    largest = max(gpus, key=lambda gpu: gpu.memory_total_bytes or 0)
    return [
        f"Each process needs at least {least_bytes / 2**30:.1f} GiB, but the largest GPU of queue '{spec.resources.queue}' is"
        f" {largest.name} with {max(totals) / 2**30:.1f} GiB: set a lower `training.micro_batch_size`, or choose a smaller student."
    ]


def _takers(spec: JobSpec, workers: Sequence[WorkerStatus]) -> list[WorkerStatus]:
    """Those that the job may come to."""
    return [worker for worker in workers if spec.resources.queue in worker.queues and worker.state is not WorkerState.LOST]


def device_warnings(spec: JobSpec, workers: Sequence[WorkerStatus]) -> list[str]:
    """Whether the job asks for GPUs of a queue whose workers, all there are, report none."""
    takers = _takers(spec, workers)
    if spec.resources.device is not Device.CUDA or not takers or any(worker.gpus for worker in takers):
        return []
    return [
        f"`resources.device` is cuda, but no worker of queue '{spec.resources.queue}' reports a GPU: set it to auto or cpu, or"
        " choose another `resources.queue` (GET /workers lists them)."
    ]


def _memory_assumptions(spec: JobSpec) -> list[str]:
    computed = f"{spec.training.precision.value} with layer normalisation in fp32" if computes_in_half(spec) else "fp32"
    return [
        "An estimate, not a measurement; docs/training.md says how far it was off where it was measured.",
        f"Products are computed in {computed}; weights, gradients and the optimiser's moments are fp32.",
        "Every caption has the text tower's full length: shorter ones take less.",
        "All teachers are on the device, as they are until their stores are filled."
        if spec.data.teacher_views
        else "All teachers are on the device and run in every step.",
        "Attention keeps no matrix of tokens by tokens, as torch's fused kernels don't.",
        "Not counted: what the CUDA context, libraries and the allocator's fragments take, and evaluation.",
    ]


def time_view(spec: JobSpec, speeds: Sequence[RecordedSpeed], num_steps: int | None) -> TimeView:
    """`speeds` of jobs like this one; `num_steps` of the whole run, if known."""
    if not speeds:
        device = spec.resources.device
        where = "" if device is Device.AUTO else f" on `resources.device` {device.value}"
        reason = (
            "No job with the same student, teachers, objective, batch size, precision and number of processes has recorded"
            f" its speed{where} yet."
        )
        return TimeView(by_device=[], assumptions=[], reason=reason)
    num_pairs = None if num_steps is None else num_steps * spec.training.global_batch_size
    assumptions = ["Training alone, at the speed recorded: evaluations, checkpoints and the start are not in it."]
    if spec.data.teacher_views and spec.teacher_fields:
        assumptions.append("The first epochs, while teachers' features are computed for their stores, take longer than later ones.")
    return TimeView(
        by_device=[
            SpeedView(
                device=one.device,
                samples_per_second=one.median,
                slowest_samples_per_second=one.slowest,
                fastest_samples_per_second=one.fastest,
                training_seconds=None if num_pairs is None else num_pairs / one.median,
                job_ids=list(one.job_ids),
            )
            for one in speeds
        ],
        assumptions=assumptions,
        reason="The number of training pairs, and so of steps, is unknown without much reading." if num_pairs is None else None,
    )
