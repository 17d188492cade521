"""Peak memory and time of the objective, dense against blocked: `python benchmarks/objective.py`.

One forward and backward pass of the paper's six terms, in float32, one process, its weights; with `--terms all`, of `soft`, `gd`,
`afd` and `mfd` besides. "Dense" is the sum of the functions of ``cliprd_core.losses``; "blocked" is
``cliprd_core.objective.Objective``; `--compile` adds the dense form through `torch.compile`. Every measurement has a process of its own,
so that its peak is its own. Extra memory is the first repetition's peak above the inputs and their gradients, which are there before it is
measured (later repetitions also hold what the allocator has kept of earlier ones). On the CPU it is resident memory as Linux counts it (so
Linux only), after a small warm-up; the compiled form's warm-up is of full size, so there its memory is only to be trusted on a GPU. Wall
time suffers from whatever else the machine does, CPU time (over all threads) hardly; both are the least of the repetitions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from cliprd_core import losses
from cliprd_core.objective import INITIAL_SCALE, Objective
from cliprd_core.objective_spec import ObjectiveSpec

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
Learned = TypeVar("Learned", Tensor, nn.Linear)

NUM_DENSE_MATRICES = 28  # roughly, at the dense peak: 26 similarity-sized float32 tensors alive, 32 by resident memory at B = 4,096
MAX_SHARE_OF_FREE_MEMORY = 0.8  # that the dense form may need, to be run
WARM_UP_SIZE = 64
TEACHER_LOGIT_SCALE = 100.0
WEIGHTS = {"paper": ObjectiveSpec(), "all": ObjectiveSpec(soft=1, soft_temperature=0.05, gd=1, afd=1, mfd=1)}  # soft with a T of its own


@dataclass(frozen=True)
class Measurement:
    """One form at one batch size."""

    extra_bytes: int
    wall_seconds: float
    cpu_seconds: float
    loss: float


@dataclass(frozen=True)
class Problem:
    """Unnormalised features, (B, D) each, student's with a gradient already there; and the objective."""

    student: tuple[Tensor, ...]  # images, texts and, with `mfd`, masked images
    teacher: tuple[Tensor, Tensor]
    log_logit_scale: Tensor
    objective: Objective


def make_problem(batch_size: int, width: int, device: torch.device, max_block_elements: int | None, terms: str) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def features() -> Tensor:
        return torch.randn(batch_size, width, generator=generator).to(device)

    weights = WEIGHTS[terms]
    student = tuple(features().requires_grad_() for _ in range(3 if weights.mfd else 2))
    for tensor in student:
        tensor.grad = torch.ones_like(tensor)  # written to, so that its pages are resident
    objective = Objective(
        weights,
        student_width=width,
        teacher_width=width,
        teacher_logit_scale=TEACHER_LOGIT_SCALE,
        max_block_elements=max_block_elements,
    ).to(device)
    log_logit_scale = torch.tensor(INITIAL_SCALE, device=device, requires_grad=True)
    return Problem(student, (features(), features()), log_logit_scale, objective)


def blocked_loss(problem: Problem) -> Tensor:
    loss: Tensor = problem.objective(
        student_image_features=problem.student[0],
        student_text_features=problem.student[1],
        student_logit_scale=problem.log_logit_scale.exp(),
        teacher_image_features=problem.teacher[0],
        teacher_text_features=problem.teacher[1],
        student_masked_image_features=problem.student[2] if len(problem.student) > 2 else None,
    ).loss
    return loss


def dense_loss(problem: Problem) -> Tensor:
    """Learns the same scales and fusions as the objective; widths are equal, so there are no projections."""
    objective = problem.objective
    weights = objective.weights
    image, text, *masked = (losses.unit_rows(one) for one in problem.student)
    teacher_image, teacher_text = (losses.unit_rows(one) for one in problem.teacher)
    features = (image, text, teacher_image, teacher_text)
    scale = problem.log_logit_scale.exp()
    image_scale, text_scale, cross_scale = _given(objective.image_scale), _given(objective.text_scale), _given(objective.cross_scale)
    vertical = (
        losses.vrd_kl(*features, image_scale=image_scale, text_scale=text_scale)
        + losses.vrd_ce_image(image, teacher_image, image_scale=image_scale)
        + losses.vrd_ce_text(text, teacher_text, text_scale=text_scale)
    )
    total = (
        weights.task * losses.task(image, text, student_logit_scale=scale)
        + weights.fd * losses.fd(*features)
        + weights.icl * losses.icl(*features, cross_scale=cross_scale)
        + weights.hrd * losses.hrd(*features, student_logit_scale=scale, teacher_logit_scale=TEACHER_LOGIT_SCALE)
        + weights.vrd * vertical
        + weights.xrd * losses.xrd(*features, cross_scale=cross_scale)
    )
    if weights.soft_temperature is None:
        return total
    fused_image = losses.unit_rows(_given(objective.image_fusion)(torch.cat((image, teacher_image), dim=1)))
    fused_text = losses.unit_rows(_given(objective.text_fusion)(torch.cat((text, teacher_text), dim=1)))
    return (
        total
        + weights.soft * losses.soft(*features, student_logit_scale=scale, teacher_scale=1 / weights.soft_temperature)
        + weights.gd * losses.gd(*features, student_logit_scale=scale, teacher_logit_scale=TEACHER_LOGIT_SCALE)
        + weights.afd * losses.afd(fused_image, fused_text, fusion_scale=_given(objective.fusion_scale))
        + weights.mfd * losses.mfd(masked[0], teacher_image)
    )


def _given(learned: Learned | None) -> Learned:
    if learned is None:
        raise ValueError("the dense form has CLIP-RD's six terms at least: their weights must be above 0")
    return learned


FORMS: dict[str, Callable[[Problem], Tensor]] = {
    "dense": dense_loss,
    "blocked": blocked_loss,
    "dense-compiled": torch.compile(dense_loss, dynamic=False),
}


def free_bytes(device: str) -> int:
    """Memory that a process can have now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> int:
    """Begin a new peak; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes("VmHWM")


def measure(form: str, batch_size: int, args: argparse.Namespace) -> Measurement:
    device = torch.device(args.device)
    compute = FORMS[form]
    warm_up_size = batch_size if "compiled" in form else WARM_UP_SIZE  # a graph is compiled for its shapes
    compute(make_problem(warm_up_size, args.width, device, args.max_block_elements, args.terms)).backward()
    problem = make_problem(batch_size, args.width, device, args.max_block_elements, args.terms)
    before = reset_peak(device)
    times, peaks = [], []
    for _ in range(args.repetitions):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = compute(problem)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start, time.process_time() - cpu_start))
        peaks.append(peak_bytes(device))
    wall_seconds, cpu_seconds = (min(one) for one in zip(*times, strict=True))
    return Measurement(peaks[0] - before, wall_seconds, cpu_seconds, loss.item())


def measure_in_subprocess(form: str, batch_size: int, device: str, args: argparse.Namespace) -> Measurement:
    command = [sys.executable, __file__, "--measure", form, "--sizes", str(batch_size), "--device", device, "--width", str(args.width)]
    command += ["--repetitions", str(args.repetitions), "--terms", args.terms]
    command += ["--max-block-elements", str(args.max_block_elements)] if args.max_block_elements else []
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Measurement(**json.loads(printed))


def dense_bytes(batch_size: int) -> int:
    """Of the paper's terms, roughly."""
    return NUM_DENSE_MATRICES * batch_size**2 * 4


def row(device: str, batch_size: int, form: str, measured: Measurement | None, baseline: Measurement | None) -> str:
    if measured is None:
        return f"| {device} | {batch_size} | {form} | about {dense_bytes(batch_size) / 1e9:.0f} GB with the paper's terms, not run | | | |"
    ratio = f"{measured.wall_seconds / baseline.wall_seconds:.2f} / {measured.cpu_seconds / baseline.cpu_seconds:.2f}" if baseline else ""
    cells = (f"{measured.extra_bytes / 1e6:.0f} MB", f"{measured.wall_seconds:.3f}", f"{measured.cpu_seconds:.3f}", ratio)
    return f"| {device} | {batch_size} | {form} | {' | '.join(cells)} |"


def print_table(args: argparse.Namespace) -> None:
    devices = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"D = {args.width}, float32, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print("| device | B | form | extra memory | wall s | CPU s | wall / CPU time against dense |\n|---|---|---|---|---|---|---|")
    for device in devices:
        for batch_size in args.sizes:
            measured: dict[str, Measurement | None] = {}
            for form in ("dense", "dense-compiled", "blocked") if args.compile else ("dense", "blocked"):
                fits = form == "blocked" or dense_bytes(batch_size) <= MAX_SHARE_OF_FREE_MEMORY * free_bytes(device)
                measured[form] = measure_in_subprocess(form, batch_size, device, args) if fits else None
                print(row(device, batch_size, form, measured[form], measured["dense"] if form != "dense" else None), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="batch sizes")
    parser.add_argument("--width", type=int, default=512, help="width of the features")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: both where there is a GPU")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--terms", choices=WEIGHTS, default="paper", help="CLIP-RD's six terms (`paper`), or every term there is (`all`)")
    parser.add_argument("--max-block-elements", type=int, help="default: the objective's, by device and batch")
    parser.add_argument("--compile", action="store_true", help="also the dense form through torch.compile")
    parser.add_argument("--measure", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(asdict(measure(args.measure, args.sizes[0], args))))
    else:
        print_table(args)


if __name__ == "__main__":
    main()
