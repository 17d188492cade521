"""Everything that stands before the first step: device, models, data, objective, optimiser, and the checkpoint to resume from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cliprd_core import distributed
from cliprd_core.agreement import agreed_checkpoint, check_agreement, check_run_dir_is_shared
from cliprd_core.checkpoint import TrainedParts, TrainingState, check_compatible, load_checkpoint, read_state, spec_as_json
from cliprd_core.compiled_towers import compile_towers
from cliprd_core.connections import bound_silence
from cliprd_core.control import ControlGroup
from cliprd_core.data.batch import FeatureReader
from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.loader import TrainLoader, build_train_loader
from cliprd_core.data.sources import PairSource, open_sources
from cliprd_core.data.transforms import Normalise
from cliprd_core.divergence import DivergenceWatch
from cliprd_core.evaluation.run import check_evaluation_sets
from cliprd_core.failures import InvalidSpecError
from cliprd_core.grad_cache import FeatureEncoder, GradCache, micro_batch_sizes
from cliprd_core.launcher import is_first_of_machine
from cliprd_core.metrics_log import MetricsLog, Stopwatch
from cliprd_core.models import LoadedModel, load_student, load_teacher, num_parameters
from cliprd_core.objective import Objective
from cliprd_core.optim import build_optimizer, check_schedule
from cliprd_core.precision import autocast_type, use_exact_products
from cliprd_core.retention import BestSoFar
from cliprd_core.run_dir import ATTEMPT_VARIABLE, cache_dir
from cliprd_core.run_stores import open_teacher_stores
from cliprd_core.spec import Device, JobSpec
from cliprd_core.step_module import MASK_PATCH_SIZE, Passes, StudentWithObjective, WholeBatch
from cliprd_core.teacher_ensemble import TeacherEnsemble, TeacherShape, build_objective
from cliprd_core.teacher_features import TeacherFeatures
from cliprd_core.training_spec import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is ready to take its next step."""

    spec: JobSpec
    run_dir: Path
    attempt: int
    device: torch.device
    student: LoadedModel
    teachers: list[LoadedModel]
    teacher_features: TeacherFeatures
    objective: Objective | TeacherEnsemble
    passes: Passes  # forward and backward over the student and the objective
    trainable: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    validation: PairSource | None
    control: ControlGroup
    metrics: MetricsLog
    best: BestSoFar
    divergence: DivergenceWatch
    stopwatch: Stopwatch
    num_steps: int
    start_step: int

    @property
    def num_steps_per_epoch(self) -> int:
        return self.loader.num_steps_per_epoch

    @property
    def parts(self) -> TrainedParts:
        return TrainedParts(self.student.model, self.objective, self.optimizer, self.scaler)

    def state_at(self, step: int) -> TrainingState:
        state = training_state(self.spec, self.loader, self.scaler, self.teachers, step=step, attempt=self.attempt)
        return state.model_copy(update={"best": self.best.checkpoint})


def prepare_run(spec: JobSpec, run_dir: Path) -> Run:
    """Build everything, join the process group, and resume from the newest valid checkpoint if there is one.

    Raises:
        InvalidSpecError, InvalidDataError: what the user has to change.
    """
    try:
        return _prepare(spec, run_dir)
    except InvalidDataError:
        raise
    except ValueError as error:
        raise InvalidSpecError(str(error)) from error


def choose_device(spec: JobSpec) -> torch.device:
    """This process's device.

    Raises:
        ValueError: `resources.device` or `training.precision` asks for a GPU and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if spec.resources.device is Device.CUDA and not has_cuda:
        raise ValueError("`resources.device` is cuda but torch sees no GPU here; use a worker with one, or set it to cpu")
    if spec.resources.device is Device.CPU or not has_cuda:
        if spec.training.precision is Precision.FP16:
            raise ValueError("`training.precision` fp16 needs a GPU and there is none here; use bf16 or fp32")
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"`resources.num_processes` asks for more GPUs than the {torch.cuda.device_count()} here; there is one process per GPU"
        )
    return torch.device("cuda", index)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def training_state(
    spec: JobSpec, loader: TrainLoader, scaler: torch.amp.GradScaler, teachers: Sequence[LoadedModel], *, step: int, attempt: int
) -> TrainingState:
    """The counters as a checkpoint at `step` holds them."""
    return TrainingState(
        step=step,
        num_steps=loader.num_steps_per_epoch * spec.training.epochs,
        num_steps_per_epoch=loader.num_steps_per_epoch,
        samples_seen=step * spec.training.global_batch_size,
        attempt=attempt,
        world_size=distributed.world_size(),
        teacher_sha256=[teacher.weights_sha256 for teacher in teachers],
        scaler=scaler.state_dict(),
        spec=spec_as_json(spec),
    )


def _prepare(spec: JobSpec, run_dir: Path) -> Run:
    attempt = int(os.environ.get(ATTEMPT_VARIABLE, "1"))
    device = choose_device(spec)
    use_exact_products()
    distributed.init(device)
    control = ControlGroup()
    if distributed.world_size() > 1:
        bound_silence()
    check_run_dir_is_shared(run_dir, control)
    student = load_student(spec.student, seed=spec.training.seed)
    teachers = [load_teacher(teacher, field) for field, teacher in spec.teacher_fields.items()]
    computed_in = autocast_type(spec.training.precision, device)
    source, validation = _open_pairs(spec, run_dir, control)
    stores = open_teacher_stores(spec, run_dir, source, student=student, teachers=teachers, device=device, autocast_type=computed_in)
    loader = _build_loader(spec, source, student, teachers, stores)
    num_steps = loader.num_steps_per_epoch * spec.training.epochs
    check_schedule(spec.training, num_steps)

    objective = _build_objective(spec, student, teachers)
    module = _build_module(student, objective, computed_in, device)
    optimizer = build_optimizer(module, spec.training)
    scaler = torch.amp.GradScaler(device.type, enabled=spec.training.precision is Precision.FP16)
    current = training_state(spec, loader, scaler, teachers, step=0, attempt=attempt)
    if distributed.world_size() > 1:
        check_agreement(control, _identity(current, source))
    resumed = _resume(run_dir, current, TrainedParts(student.model, objective, optimizer, scaler), control)
    if spec.training.compile:
        _compile(student, spec, run_dir, device, computed_in)
    start_step, best_before = (0, None) if resumed is None else (resumed.step, resumed.best)
    best = BestSoFar.at_start(run_dir, spec.training.keep_checkpoints.best, best_before, start_step)
    if distributed.is_main():
        best.write(run_dir)  # an attempt on another machine, or one that was killed before it could say so, may have found another one
    run = Run(
        spec=spec,
        run_dir=run_dir,
        attempt=attempt,
        device=device,
        student=student,
        teachers=teachers,
        teacher_features=TeacherFeatures(teachers, stores, device, computed_in, spec.training.micro_batch_size),
        objective=objective,
        passes=_build_passes(module, spec, device),
        trainable=[parameter for parameter in module.parameters() if parameter.requires_grad],
        optimizer=optimizer,
        scaler=scaler,
        loader=loader,
        validation=validation,
        control=control,
        metrics=_open_metrics(run_dir, spec, loader, device, attempt=attempt, start_step=start_step),
        best=best,
        divergence=DivergenceWatch(is_scaled=scaler.is_enabled()),
        stopwatch=Stopwatch(),
        num_steps=num_steps,
        start_step=start_step,
    )
    _announce(run)
    return run


def _build_loader(
    spec: JobSpec,
    source: PairSource,
    student: LoadedModel,
    teachers: Sequence[LoadedModel],
    stores: Sequence[FeatureReader | None],
) -> TrainLoader:
    """This rank's share of the batches."""
    return build_train_loader(
        spec,
        source,
        student=student.model_input,
        teachers=[teacher.model_input for teacher in teachers],
        readers=stores,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _open_metrics(run_dir: Path, spec: JobSpec, loader: TrainLoader, device: torch.device, *, attempt: int, start_step: int) -> MetricsLog:
    """Where this attempt's measurements go, after those of earlier ones."""
    return MetricsLog(
        run_dir,
        attempt=attempt,
        num_steps=loader.num_steps_per_epoch * spec.training.epochs,
        num_steps_per_epoch=loader.num_steps_per_epoch,
        global_batch_size=spec.training.global_batch_size,
        start_step=start_step,
        device=_device_name(device),
    )


def _open_pairs(spec: JobSpec, run_dir: Path, control: ControlGroup) -> tuple[PairSource, PairSource | None]:
    """The training and the validation pairs."""
    world_size = distributed.world_size()
    batch_size = spec.training.global_batch_size
    if batch_size % world_size:
        raise ValueError(f"`training.global_batch_size` ({batch_size}) must be a multiple of the {world_size} training processes")
    cache = cache_dir(run_dir)
    # Rank 0 indexes the shards, then each machine's first process reads that index, or makes its own where caches aren't shared.
    own_turn = 0 if distributed.is_main() else 1 if is_first_of_machine() else 2
    for _ in range(own_turn):
        control.wait()
    source = open_sources(spec.data.train, cache)
    validation = open_sources(spec.data.validation, cache) if spec.data.validation else None
    if distributed.is_main():
        check_evaluation_sets(spec.evaluation, cache)
    for _ in range(own_turn, 2):
        control.wait()
    if len(source) < batch_size:
        raise ValueError(f"`training.global_batch_size` is {batch_size} but `data.train` holds {len(source)} pairs; lower it or add data")
    return source, validation


def _identity(state: TrainingState, source: PairSource) -> dict[str, str | None]:
    """What every process of a run must have in common."""
    return {
        "the spec": json.dumps(state.spec, sort_keys=True),
        "the training pairs": source.fingerprint,
        "the teachers' weights": ", ".join(str(sha256) for sha256 in state.teacher_sha256),
    }


def _mask_patch_size(student: LoadedModel) -> int:
    """Pixels: the student's own patches where it has square ones (open_clip's ViTs)."""
    patch_size = getattr(student.model.visual, "patch_size", None)
    return int(patch_size[0]) if isinstance(patch_size, tuple) and patch_size[0] == patch_size[1] else MASK_PATCH_SIZE


def _build_objective(spec: JobSpec, student: LoadedModel, teachers: Sequence[LoadedModel]) -> Objective | TeacherEnsemble:
    """The objective, its projections initialised from `training.seed`."""
    if not spec.objective.uses_student_logit_scale:
        student.model.logit_scale.requires_grad_(False)  # no term uses it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.training.seed)
        return build_objective(
            spec.objective,
            student_width=student.embed_dim,
            teachers=[TeacherShape(one.embed_dim, float(one.model.logit_scale.detach().exp())) for one in teachers],
        )


def _build_module(
    student: LoadedModel, objective: Objective | TeacherEnsemble, computed_in: torch.dtype | None, device: torch.device
) -> StudentWithObjective:
    """Student and objective on `device`, with nothing left to train that the features don't depend on."""
    prepare = Normalise(student.preprocess)
    module = StudentWithObjective(student.model, objective, computed_in, _mask_patch_size(student), prepare=prepare).to(device)
    if distributed.world_size() > 1:
        _freeze_unused(student, device)
    return module


def _resume(run_dir: Path, current: TrainingState, parts: TrainedParts, control: ControlGroup) -> TrainingState | None:
    """Load the newest valid checkpoint, as found by rank 0; returns its state, None without one."""
    folder = agreed_checkpoint(run_dir, control)
    if folder is None:
        return None
    saved = read_state(folder)
    check_compatible(saved, current)
    load_checkpoint(folder, parts)
    return saved


def _compile(student: LoadedModel, spec: JobSpec, run_dir: Path, device: torch.device, computed_in: torch.dtype | None) -> None:
    micro_batch_size = _micro_batch_size(spec)
    compile_towers(
        student,
        batch_sizes=micro_batch_sizes(_num_of_rank(spec), micro_batch_size or _num_of_rank(spec)),
        in_micro_batches=micro_batch_size is not None,
        device=device,
        autocast_type=computed_in,
        cache_dir=cache_dir(run_dir),
    )


def _build_passes(module: StudentWithObjective, spec: JobSpec, device: torch.device) -> Passes:
    micro_batch_size = _micro_batch_size(spec)
    if micro_batch_size is None:
        return WholeBatch(_data_parallel(module))
    return GradCache(module, _data_parallel(FeatureEncoder(module)), micro_batch_size, device)


def _micro_batch_size(spec: JobSpec) -> int | None:
    """Where `training.micro_batch_size` asks for micro batches and this process's share is larger than one; None: the whole at once."""
    size = spec.training.micro_batch_size
    return None if size is None or size >= _num_of_rank(spec) else size


def _num_of_rank(spec: JobSpec) -> int:
    """Pairs of each step that are this process's."""
    return spec.training.global_batch_size // distributed.world_size()


def _data_parallel(module: nn.Module) -> nn.Module:
    """Wrap for several processes; alone, the module itself.

    A student with batch normalisation (`RN50`, …) normalises over each process's share, and rank 0's running statistics are kept.
    """
    if distributed.world_size() == 1:
        return module
    # Without `device_ids`, so that the wrapper leaves its inputs where they are: the tokens on the host.
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def _freeze_unused(student: LoadedModel, device: torch.device) -> None:
    """Freeze parameters that the features don't depend on (an unused pooler, …), or the wrapper would wait for their gradients."""
    model = student.model
    model.eval()  # so that the probe leaves running statistics alone
    size = student.preprocess.image_size
    image_features = model.encode_image(torch.zeros(2, 3, size, size, device=device))
    text_features = model.encode_text(student.tokenizer(["a", "b"]).to(device))
    torch.autograd.backward([image_features.sum(), text_features.sum()])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None and name != "logit_scale":
            logger.warning("`student`: %s does not take part in the features and is not trained", name)
            parameter.requires_grad_(False)
    model.zero_grad()
    model.train()


def _announce(run: Run) -> None:
    """One line on what is about to happen."""
    if run.spec.training.precision is Precision.BF16 and autocast_type(Precision.BF16, run.device) is None:
        logger.warning("this CPU has no fast bf16 arithmetic, so everything is computed in fp32 (`training.precision` is bf16)")
    sizes = " + ".join(f"{num_parameters(teacher.model) / 1e6:.1f}" for teacher in run.teachers)
    teacher = f"teacher {sizes} M parameters" if sizes else "no teacher"
    logger.info(
        "student %.1f M parameters, %s, %d pairs, %d steps of %d on %d x %s; %s",
        num_parameters(run.student.model) / 1e6,
        teacher,
        run.loader.num_samples,
        run.num_steps,
        run.spec.training.global_batch_size,
        distributed.world_size(),
        run.device,
        f"resuming at step {run.start_step}" if run.start_step else "starting",
    )
