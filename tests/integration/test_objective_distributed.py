"""Several processes over Gloo: the objective's values and gradients are those of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cliprd_core import distributed
from cliprd_core.objective import Objective, ObjectiveOutput
from cliprd_core.objective_spec import ObjectiveSpec, ScaleMode, TeacherCombination
from cliprd_core.teacher_ensemble import TeacherShape, build_objective
from tests.process_group import join_group, run_processes
from tests.unit import numpy_objective as oracle
from tests.unit.test_objective import STUDENT_FEATURES, Problem, problems, run_problem

PAPER = ObjectiveSpec()
UNEQUAL_WEIGHTS = ObjectiveSpec(task=0.5, fd=20, icl=2, hrd=3, vrd=0.25, xrd=4)
PLAIN_CLIP = ObjectiveSpec(task=1, fd=0, icl=0, hrd=0, vrd=0, xrd=0)
CLIP_KD = ObjectiveSpec(vrd=0, xrd=0)
NO_CONTRAST = ObjectiveSpec(task=0, fd=1, icl=0, hrd=1, vrd=0, xrd=0)
FD_ONLY = ObjectiveSpec(task=0, fd=1, icl=0, hrd=0, vrd=0, xrd=0)
WIDENED = ObjectiveSpec(
    **{"vrd_kl": 3, "vrd_ce_image": 0.5, "vrd_ce_text": 0}, soft=2, soft_temperature=0.1, gd=2, afd=3, mfd=5, scale_mode=ScaleMode.EXP
)
STUDENT_WIDTH, RAW_WIDTH = 6, 5


class TrainedModules(nn.Module):
    """A student of one linear map per modality with its scale, and the objective: all that a data-parallel wrapper takes."""

    def __init__(self, weights: ObjectiveSpec, teacher_widths: Sequence[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(RAW_WIDTH, STUDENT_WIDTH)
        self.text = nn.Linear(RAW_WIDTH, STUDENT_WIDTH)
        self.log_logit_scale = nn.Parameter(torch.tensor(2.5)) if weights.uses_student_logit_scale else torch.tensor(2.5)
        teachers = [TeacherShape(width, 40.0 - 10 * index) for index, width in enumerate(teacher_widths)]
        self.objective = build_objective(weights, student_width=STUDENT_WIDTH, teachers=teachers)
        for module in self.modules():
            if isinstance(module, Objective):
                module.max_block_elements = 50
        self.double()

    def forward(self, batch: list[Tensor], row_counts: list[int] | None = None) -> ObjectiveOutput:
        images, texts, teacher_images, teacher_texts, masked_images = batch
        output: ObjectiveOutput = self.objective(
            student_image_features=self.image(images),
            student_text_features=self.text(texts),
            student_logit_scale=self.log_logit_scale.exp(),
            teacher_image_features=teacher_images,
            teacher_text_features=teacher_texts,
            student_masked_image_features=self.image(masked_images),
            row_counts=row_counts,
        )
        return output


def make_batch(num_pairs: int, teacher_width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_pairs)
    widths = (RAW_WIDTH, RAW_WIDTH, teacher_width, teacher_width, RAW_WIDTH)
    return [torch.randn(num_pairs, width, generator=generator, dtype=torch.float64) for width in widths]


def row_counts_of(num_processes: int) -> list[list[int]]:
    """Even shares, uneven ones, and one rank without any pair."""
    even, uneven = [4] * num_processes, [5] * (num_processes - 1) + [2]
    return [even, uneven, [0] + [3] * (num_processes - 1)] if num_processes > 1 else [even]


def check_objective(rank: int, num_processes: int, port: int) -> None:
    """What each process runs: first alone on the whole batch, then its share in a group, wrapped as training wraps it."""
    several = [
        (weights.model_copy(update={"teacher_combination": combination}), (STUDENT_WIDTH, 8, STUDENT_WIDTH), row_counts)
        for weights in (PAPER, WIDENED)
        for combination in TeacherCombination
        for row_counts in row_counts_of(num_processes)
    ]
    cases = [
        (weights, (teacher_width,), row_counts)
        for weights in (PAPER, UNEQUAL_WEIGHTS, PLAIN_CLIP, CLIP_KD, NO_CONTRAST, FD_ONLY, WIDENED)
        for teacher_width in (STUDENT_WIDTH, 8)
        for row_counts in row_counts_of(num_processes)
    ] + (several if num_processes == 2 else [])
    expected = []
    for weights, teacher_widths, row_counts in cases:
        alone = TrainedModules(weights, teacher_widths)
        output = alone(make_batch(sum(row_counts), sum(teacher_widths)))
        output.loss.backward()
        expected.append((output, {name: parameter.grad for name, parameter in alone.named_parameters()}))
    join_group(rank, num_processes, port)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, num_processes, rank == 0)
    for number, ((weights, teacher_widths, row_counts), (whole, gradients)) in enumerate(zip(cases, expected, strict=True)):
        modules = TrainedModules(weights, teacher_widths)
        wrapped: nn.Module = DistributedDataParallel(modules) if num_processes > 1 else modules
        batch = make_batch(sum(row_counts), sum(teacher_widths))
        known_row_counts = row_counts if number % 4 < 2 else None  # even and uneven ones, both with and without
        output = wrapped([tensor.split(row_counts)[rank] for tensor in batch], known_row_counts)
        output.loss.backward()
        torch.testing.assert_close(output.total, whole.total, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(output.terms, whole.terms, rtol=1e-9, atol=1e-12)
        mean_loss = distributed.all_reduce_sum(output.loss) / num_processes
        torch.testing.assert_close(mean_loss, whole.total, rtol=1e-9, atol=1e-12)
        for name, parameter in modules.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-11)
    distributed.all_reduce_sum(torch.zeros(1))  # so that none leaves before the others are done
    distributed.shutdown()


def check_properties(rank: int, num_processes: int, port: int) -> None:
    """Random problems in random shares, some of them empty: NumPy's values, and the gradients of one process."""
    drawn: list[Problem] = []

    @settings(
        max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(problems())
    def draw(problem: Problem) -> None:
        drawn.append(problem)

    draw()  # alike on every rank, as it is derandomised
    assert len(drawn) == 40
    alone = [run_problem(*problem) for problem in drawn]
    join_group(rank, num_processes, port)
    generator = np.random.default_rng(0)
    for problem, (whole, gradients) in zip(drawn, alone, strict=True):
        variables, teacher, _, max_block_elements = problem
        row_counts = generator.multinomial(len(teacher.image), [1 / num_processes] * num_processes).tolist()
        rows = slice(sum(row_counts[:rank]), sum(row_counts[: rank + 1]))
        output, found = run_problem(*problem, rows=rows, row_counts=row_counts if max_block_elements % 2 else None)
        expected = oracle.terms(variables, teacher)
        for name in output.terms.keys() - {"vrd"}:
            assert output.terms[name].item() == pytest.approx(expected[name], rel=1e-9, abs=1e-10)
        torch.testing.assert_close(output.total, whole.total, rtol=1e-9, atol=1e-12)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            of_rank = gradient[rows] * num_processes if name in STUDENT_FEATURES else gradient
            mean = found[name] if name in STUDENT_FEATURES else distributed.all_reduce_sum(found[name]) / num_processes
            smallest = 1e-9 * (1e-3 + float(gradient.abs().max()))
            torch.testing.assert_close(mean, of_rank, rtol=1e-9, atol=smallest, msg=lambda text, name=name: f"{name}: {text}")
    distributed.all_reduce_sum(torch.zeros(1))  # so that none leaves before the others are done
    distributed.shutdown()


def check_feature_gradients(rank: int, num_processes: int, port: int) -> None:
    """Without a wrapper: gradients of each rank's own features are those rows of the whole batch's, times the number of ranks."""
    names = ("student_image_features", "student_text_features", "teacher_image_features", "teacher_text_features")
    row_counts = [3, 5, 1, 2][:num_processes]
    torch.manual_seed(0)
    batch = dict(zip(names, torch.randn(4, sum(row_counts), 6, dtype=torch.float64), strict=True))
    objective = Objective(PAPER, student_width=6, teacher_width=6, teacher_logit_scale=30.0, max_block_elements=20).double()

    def student_gradients(features: dict[str, Tensor]) -> list[Tensor]:
        leaves = [features[name].clone().requires_grad_() for name in names[:2]]
        output = objective(**(features | dict(zip(names, leaves, strict=False))), student_logit_scale=torch.tensor(20.0))
        return list(torch.autograd.grad(output.loss, leaves))

    expected = student_gradients(batch)
    join_group(rank, num_processes, port)
    found = student_gradients({name: tensor.split(row_counts)[rank] for name, tensor in batch.items()})
    for one, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(one, whole.split(row_counts)[rank] * num_processes, rtol=1e-9, atol=1e-12)
    distributed.shutdown()


def check_collectives(rank: int, num_processes: int, port: int) -> None:
    join_group(rank, num_processes, port)
    own = torch.full((rank + 1, 2), float(rank), dtype=torch.float64, requires_grad=True)
    gathered = distributed.gather_with_grad(own)
    assert gathered[:, 0].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 2.0][: len(gathered)]
    assert len(gathered) == num_processes * (num_processes + 1) // 2
    position = torch.arange(len(gathered), dtype=torch.float64)
    (gathered * position[:, None] * (rank + 1)).sum().backward()
    first = rank * (rank + 1) // 2
    sum_of_factors = num_processes * (num_processes + 1) / 2
    assert own.grad is not None
    torch.testing.assert_close(own.grad[:, 0], position[first : first + rank + 1] * sum_of_factors)

    mine = torch.tensor([float(rank), 1.0], requires_grad=True)
    total = distributed.all_reduce_sum(mine)
    assert total.tolist() == [num_processes * (num_processes - 1) / 2, num_processes]
    assert not total.requires_grad
    assert mine.tolist() == [rank, 1.0]

    logs = torch.tensor([float(rank), -torch.inf, 1000.0 if rank == 0 else -torch.inf])
    expected = torch.logsumexp(torch.arange(num_processes, dtype=torch.float32), dim=0)
    largest, sums = distributed.all_reduce_exp_sum(logs, (logs > -torch.inf).float())
    assert largest.tolist() == [num_processes - 1, -torch.inf, 1000.0]
    torch.testing.assert_close(largest + sums.log(), torch.tensor([expected, -torch.inf, 1000.0]))
    assert distributed.gather_row_counts(rank + 3) == [3 + one for one in range(num_processes)]
    distributed.shutdown()
    assert distributed.world_size() == 1


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_equals_one_process_on_the_whole_batch(num_processes: int) -> None:
    run_processes(check_objective, num_processes)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_random_problems_equal_numpy_and_one_process(num_processes: int) -> None:
    run_processes(check_properties, num_processes)


def test_feature_gradients() -> None:
    run_processes(check_feature_gradients, 3)


def test_collectives() -> None:
    run_processes(check_collectives, 3)


def test_alone_everything_works_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.init(torch.device("cpu"))
    assert not dist.is_initialized()
    x = torch.ones(2, 3)
    assert distributed.gather_with_grad(x) is x
    assert distributed.all_reduce_sum(x).equal(x)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.shutdown()


def test_a_launcher_that_forgot_a_variable_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT"):
        distributed.init(torch.device("cpu"))
