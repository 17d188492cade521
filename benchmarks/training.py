"""Training speed, step by step: `python benchmarks/training.py`, one table of what each improvement brings.

The reference way is what the papers' scripts do: the teacher runs in every step, texts of the whole context length, the dense loss,
AdamW without its fused kernel. Then each improvement alone, all together with the teacher's features stored and while the store fills, and
the student trained with no teacher at all, which is the bound. Images and captions are made up; captions have the lengths of web
captions (log-normal, `--mean-tokens` on average with both end tokens). Loading data is not part of it: see benchmarks/data.py.

All ways take the same batches in the same process, in turn, round by round; a way's time is its median over the rounds, after a first one
that is not counted. `--compile` adds `torch.compile` of the student, `--channels-last` its images and weights in that layout.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from dense_objective import DenseObjective
from torch import Tensor, nn

from cliprd_core.compiled_towers import compile_towers
from cliprd_core.data.batch import Batch, StoredFeatures
from cliprd_core.data.transforms import Normalise
from cliprd_core.models import LoadedModel, load_student
from cliprd_core.objective import Objective
from cliprd_core.objective_spec import ObjectiveSpec
from cliprd_core.optim import build_optimizer
from cliprd_core.precision import autocast_type
from cliprd_core.spec import StudentSpec
from cliprd_core.step_module import StudentWithObjective, WholeBatch
from cliprd_core.store_dir import StoreKey
from cliprd_core.teacher_features import TeacherFeatures
from cliprd_core.teacher_store import TeacherStore, open_store
from cliprd_core.training_spec import Precision, TrainingSpec

PLAIN = {"fd": 0.0, "icl": 0.0, "hrd": 0.0, "vrd": 0.0, "xrd": 0.0}
START_TOKEN, END_TOKEN = 49406, 49407
NUM_BATCHES = 2


@dataclass(frozen=True)
class Way:
    """One way of training."""

    name: str
    has_teacher: bool = True
    stored: bool = False  # the teacher's features are there
    filling: bool = False  # the store is there, empty
    trims_text: bool = False
    blocked_loss: bool = False
    fused_optimizer: bool = False
    compiled: bool = False
    channels_last: bool = False


def ways(*, with_compile: bool, with_channels_last: bool) -> list[Way]:
    reference = Way("reference way")
    everything = Way("all together, store filled", stored=True, trims_text=True, blocked_loss=True, fused_optimizer=True)
    bound = replace(everything, name="no teacher (the bound)", has_teacher=False, stored=False)
    listed = [
        reference,
        replace(reference, name="teacher's features stored", stored=True),
        replace(reference, name="text without padding", trims_text=True),
        replace(reference, name="loss in blocks", blocked_loss=True),
        replace(reference, name="fused AdamW", fused_optimizer=True),
        replace(everything, name="all together, store filling", stored=False, filling=True),
        everything,
        bound,
    ]
    if with_compile:
        listed.insert(5, replace(reference, name="compiled student", compiled=True))
        listed += [replace(one, name=f"{one.name}, compiled", compiled=True) for one in (everything, bound)]
    if with_channels_last:
        listed.append(replace(everything, name="all together, channels-last", channels_last=True))
    return listed


class ChannelsLast(nn.Module):
    """(B, 3, H, W) images in the order in which their pixels came."""

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


class WholeContext(nn.Module):
    """A model whose texts are taken at full length: nothing that the trainer knows how to shorten."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.visual = model.visual
        self.logit_scale = model.logit_scale

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        return self.model.encode_image(images, normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.model.encode_text(tokens, normalize)


def make_store(way: Way, root: Path, width: int, args: argparse.Namespace) -> TeacherStore:
    """A store on disk with all features of every batch, or with none of any step's."""
    num_samples = args.batch_size * (args.rounds + 1)
    key = StoreKey(
        teacher_sha256=way.name,
        teacher_config={},
        data_fingerprint="made up",
        num_samples=num_samples,
        transform={},
        crop_scale=(0.9, 1.0),
        num_views=1,
        seed=0,
        precision=args.precision,
        width=width,
    )
    store = open_store(root, key, teacher=args.teacher, data="made up")
    if way.stored:
        rows = store.rounded(torch.randn(num_samples, width, generator=torch.Generator().manual_seed(0)))
        store.write_images(np.arange(num_samples), 0, rows)
        store.write_texts(np.arange(num_samples), rows)
    return store


def make_batches(args: argparse.Namespace, student: LoadedModel, teacher: LoadedModel) -> list[Batch]:
    """Images and captions, both models' at their own size."""
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    sigma = 0.5
    batches = []
    for _ in range(NUM_BATCHES):
        lengths = rng.lognormal(np.log(args.mean_tokens) - sigma**2 / 2, sigma, args.batch_size).round().clip(4, 77).astype(int)
        tokens = torch.zeros(args.batch_size, 77, dtype=torch.int64)
        for row, length in enumerate(lengths):
            tokens[row, 0], tokens[row, length - 1] = START_TOKEN, END_TOKEN
            tokens[row, 1 : length - 1] = torch.randint(1, START_TOKEN, (length - 2,), generator=generator)
        images = [
            torch.randint(0, 256, (args.batch_size, size, size, 3), generator=generator, dtype=torch.uint8)
            for size in _image_sizes(student, teacher)
        ]
        batches.append(
            Batch(
                sample_indices=torch.arange(args.batch_size),
                stand_ins=torch.zeros(args.batch_size, dtype=torch.bool),
                view=0,
                student_pixels=images[0],
                student_tokens=tokens,
                teacher_pixels=(images[1] if len(images) > 1 else None,),
                teacher_tokens=(None,),
            )
        )
    return batches


def _image_sizes(student: LoadedModel, teacher: LoadedModel) -> list[int]:
    sizes = [student.preprocess.image_size, teacher.preprocess.image_size]
    return sizes if sizes[0] != sizes[1] else sizes[:1]


def make_step(way: Way, teacher: LoadedModel, args: argparse.Namespace, root: Path) -> Callable[[Batch], None]:
    """One training step in this way, with models of its own, and a store of its own under `root`."""
    device = torch.device(args.device)
    dtype = autocast_type(Precision(args.precision), device)
    model = load_student(StudentSpec(model=args.student), seed=0)
    weights = ObjectiveSpec() if way.has_teacher else ObjectiveSpec(**PLAIN)
    shape = {"student_width": model.embed_dim, "teacher_width": teacher.embed_dim, "teacher_logit_scale": 100.0}
    objective = (Objective if way.blocked_loss else DenseObjective)(weights, **shape)
    trained = model.model if way.trims_text else WholeContext(model.model)
    prepare = nn.Sequential(Normalise(model.preprocess), ChannelsLast() if way.channels_last else nn.Identity())
    module = StudentWithObjective(trained, objective, dtype, prepare=prepare).to(device).train()
    if way.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if way.compiled:
        compile_towers(
            model, batch_sizes=[args.batch_size], in_micro_batches=False, device=device, autocast_type=dtype, cache_dir=Path(args.cache)
        )
    optimizer = build_optimizer(module, TrainingSpec())
    if not way.fused_optimizer:
        optimizer = torch.optim.AdamW(optimizer.param_groups, foreach=True)
        for group in optimizer.param_groups:
            group["fused"] = None
    store = make_store(way, root, teacher.embed_dim, args) if way.stored or way.filling else None
    num_steps = 0
    frozen = replace(teacher, model=teacher.model if way.trims_text else WholeContext(teacher.model))
    features = TeacherFeatures([frozen] if way.has_teacher else [], [store] if way.has_teacher else [], device, dtype, None)
    passes = WholeBatch(module)

    def step(batch: Batch) -> None:
        nonlocal num_steps
        indices = batch.sample_indices + num_steps * args.batch_size  # others in each step: those of a store that fills are never there
        num_steps += 1
        stored = None if store is None else StoredFeatures.read(store, indices.numpy(), 0)
        batch = replace(batch, sample_indices=indices, stored_features=(stored,)).to(device)
        image_features, text_features = features.of(batch)
        losses = passes.forward(batch.student_pixels, batch.student_tokens, image_features, text_features)
        passes.backward(losses["loss"])
        optimizer.step()
        optimizer.zero_grad()
        features.flush()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(args: argparse.Namespace) -> dict[Way, float]:
    """Seconds a step, by way."""
    teacher = load_student(StudentSpec(model=args.teacher), seed=1)
    teacher.model.requires_grad_(False).eval()
    student = load_student(StudentSpec(model=args.student), seed=0)
    batches = make_batches(args, student, teacher)
    listed = ways(with_compile=args.compile, with_channels_last=args.channels_last)
    times: dict[Way, list[float]] = {way: [] for way in listed}
    with tempfile.TemporaryDirectory(prefix="cliprd-bench-") as root:
        steps = {way: make_step(way, teacher, args, Path(root)) for way in listed}
        for round_number in range(args.rounds + 1):
            for way, step in steps.items():
                start = time.perf_counter()
                step(batches[round_number % NUM_BATCHES])
                if round_number > 0:
                    times[way].append(time.perf_counter() - start)
    return {way: statistics.median(one) for way, one in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="ViT-B-16", help="open_clip name")
    parser.add_argument("--student", default="ViT-T-16", help="open_clip name")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs a step")
    parser.add_argument("--mean-tokens", type=float, default=15.0, help="of a caption, end tokens included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16", choices=[one.value for one in Precision if one is not Precision.FP16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes to warm up")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "cliprd-bench-cache"), help="where compiled kernels are kept")
    parser.add_argument("--channels-last", action="store_true", help="also with the student in channels-last layout")
    args = parser.parse_args()
    seconds = measure(args)
    by_name = {way.name: value for way, value in seconds.items()}
    reference, bound = by_name["reference way"], by_name["no teacher (the bound)"]
    dtype = autocast_type(Precision(args.precision), torch.device(args.device)) or torch.float32
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.teacher} -> {args.student}, batch {args.batch_size}, {dtype}, {name}, torch {torch.__version__}")
    print("| way | s a step | samples/s | times the reference | of the bound |\n|---|---|---|---|---|")
    for way, value in seconds.items():
        rates = f"{args.batch_size / value:.1f} | {reference / value:.2f} | {bound / value:.2f}"
        print(f"| {way.name} | {value:.3f} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
