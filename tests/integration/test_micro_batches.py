"""Training in micro batches: whole runs follow the curve of the whole batch, resume exactly, and processes exchange gradients once."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cliprd_core import distributed
from cliprd_core import losses as losses_by_equation
from cliprd_core.grad_cache import FeatureEncoder, GradCache
from cliprd_core.objective import Objective
from cliprd_core.objective_spec import ObjectiveSpec, TeacherCombination
from cliprd_core.run_dir import EXIT_CODE_STOPPED
from cliprd_core.run_setup import prepare_run
from cliprd_core.spec import JobSpec
from cliprd_core.step_module import WholeBatch
from cliprd_core.trainer import train_step
from tests.integration.test_training import TIMEOUT_SECONDS, assert_same_weights, losses, metrics, run_here, start, wait_for_step
from tests.process_group import join_group, run_processes
from tests.tiny import MODEL_IMAGE_SIZE, tiny_config, tiny_spec, write_shards, write_teacher
from tests.unit.test_grad_cache import EVERY_TERM, gradients_of, make_batch, make_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher of another width and resolution, and a finished run without micro batches."""
    folder = tmp_path_factory.mktemp("micro-batches")
    write_shards(folder / "shards", 32)
    write_teacher(folder / "teacher", tiny_config(width=48, embed_dim=48, image_size=48))
    assert run_here(folder / "whole", make_spec(folder)) == 0
    return folder


@pytest.fixture(autouse=True)
def _own_signals() -> Any:
    """`train.main` installs a handler for SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def make_spec(folder: Path, **changes: Any) -> JobSpec:
    return tiny_spec(str(folder / "shards" / "00000.tar"), teacher=f"local-dir:{folder / 'teacher'}", **changes)


def assert_same_curve(run: Path, expected: Path) -> None:
    """Losses to 1e-4 relative, as AdamW's first steps amplify fp32's rounding; the first step's to fp32's rounding itself."""
    assert losses(run).keys() == losses(expected).keys()
    assert losses(run)[1] == pytest.approx(losses(expected)[1], rel=1e-6)
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4)
    first, first_expected = metrics(run)[0].values, metrics(expected)[0].values
    assert first["train/grad_norm"] == pytest.approx(first_expected["train/grad_norm"], rel=1e-5)


def test_a_run_in_micro_batches_follows_the_whole_batch_s_curve(folder: Path, tmp_path: Path) -> None:
    assert run_here(tmp_path / "run", make_spec(folder, training={"micro_batch_size": 3})) == 0
    assert_same_curve(tmp_path / "run", folder / "whole")


def test_a_micro_batch_that_holds_the_whole_batch_changes_nothing(folder: Path, tmp_path: Path) -> None:
    assert run_here(tmp_path / "run", make_spec(folder, training={"micro_batch_size": 8})) == 0
    assert losses(tmp_path / "run") == losses(folder / "whole")
    assert_same_weights(tmp_path / "run", folder / "whole")


def test_neither_model_ever_sees_more_than_a_micro_batch(folder: Path, tmp_path: Path) -> None:
    run = prepare_run(make_spec(folder, training={"micro_batch_size": 3}), tmp_path)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    (teacher,) = run.teachers
    for name, model in (("student", run.student.model), ("teacher", teacher.model)):
        model.visual.register_forward_pre_hook(lambda _, inputs, sizes=seen[name]: sizes.append(len(inputs[0])))
    batch = next(iter(run.loader.epoch(0)))
    train_step(run, batch, 0)
    run.loader.close()
    assert seen == {"teacher": [3, 3, 2], "student": [3, 3, 2] * 2}


def test_two_processes_in_micro_batches_follow_the_curve_of_one(folder: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "run", make_spec(folder, training={"micro_batch_size": 2}, resources={"num_processes": 2}), num_processes=2)
    assert process.wait(TIMEOUT_SECONDS) == 0, (tmp_path / "run" / "log.txt").read_text()
    assert_same_curve(tmp_path / "run", folder / "whole")


def test_a_stopped_run_with_patch_dropout_resumes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    config = tiny_config()
    config["vision_cfg"]["patch_dropout"] = 0.3
    spec = make_spec(folder, student={"config": config}, training={"micro_batch_size": 3, "epochs": 6})
    assert start(tmp_path / "reference", spec).wait(TIMEOUT_SECONDS) == 0
    process = start(tmp_path / "stopped", spec, held_step=23)
    wait_for_step(tmp_path / "stopped", 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_SECONDS) == EXIT_CODE_STOPPED, (tmp_path / "stopped" / "log.txt").read_text()
    assert metrics(tmp_path / "stopped")[-1].step < 24, "it was stopped on the way"
    process = start(tmp_path / "stopped", spec, attempt=2)
    assert process.wait(TIMEOUT_SECONDS) == 0, (tmp_path / "stopped" / "log.txt").read_text()
    # Reported sums may differ in their last bit; weights may not.
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "reference"), rel=1e-6)
    assert_same_weights(tmp_path / "stopped", tmp_path / "reference")


def check_running_statistics(rank: int) -> None:
    """With batch normalisation both processes get the same gradients, and rank 0's running statistics, as without micro batches."""
    config = tiny_config(width=16, embed_dim=16)
    config["vision_cfg"] = {"image_size": MODEL_IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    module, batch = make_module(config=config), make_batch(12)
    encoder = DistributedDataParallel(FeatureEncoder(module), gradient_as_bucket_view=True)
    own = [tensor.tensor_split(2)[rank] for tensor in batch]
    _, gradients = gradients_of(GradCache(module, encoder, 3, torch.device("cpu")), module, own)
    for tensor in (gradients["student.visual.conv1.weight"], module.student.visual.bn1.running_mean):
        assert tensor.abs().max() > 0
        torch.testing.assert_close(distributed.all_reduce_sum(tensor), 2 * tensor, rtol=1e-12, atol=0)
    assert module.student.visual.bn1.num_batches_tracked == 2, "once for each micro batch"


def check_masked_term(rank: int) -> None:
    """`mfd` over uneven shares: the value of the whole batch, and each process's rows of its gradient times their number."""
    torch.manual_seed(0)
    weights = ObjectiveSpec(task=1, fd=0, icl=0, hrd=0, vrd=0, xrd=0, mfd=3)
    objective = Objective(weights, student_width=6, teacher_width=6).double()
    student_image, student_text, masked, teacher_image, teacher_text = torch.randn(5, 7, 6, dtype=torch.float64)
    masked.requires_grad_()
    mean = losses_by_equation.mfd(losses_by_equation.unit_rows(masked), losses_by_equation.unit_rows(teacher_image))
    (expected,) = torch.autograd.grad(3 * mean, masked)
    rows = slice(0, 5) if rank == 0 else slice(5, 7)
    output = objective(
        student_image_features=student_image[rows],
        student_text_features=student_text[rows],
        student_logit_scale=torch.tensor(20.0),
        teacher_image_features=teacher_image[rows],
        teacher_text_features=teacher_text[rows],
        student_masked_image_features=masked[rows],
    )
    torch.testing.assert_close(output.terms["mfd"], mean.detach(), rtol=1e-9, atol=0)
    (found,) = torch.autograd.grad(output.loss, masked)
    torch.testing.assert_close(found[rows], 2 * expected[rows], rtol=1e-9, atol=1e-12)


def check_one_exchange(rank: int, num_processes: int, port: int) -> None:
    """What each process runs: gradients equal one process's on all pairs, in fp64, and cross the wires once a step."""
    module, batch = make_module(), make_batch(12)
    expected_losses, gradients = gradients_of(WholeBatch(module), module, batch)
    expected = {name: gradient.clone() for name, gradient in gradients.items()}
    module.zero_grad()
    join_group(rank, num_processes, port)
    encoder = DistributedDataParallel(FeatureEncoder(module), gradient_as_bucket_view=True)
    num_reduced = torch.zeros((), dtype=torch.int64)

    def average(_state, bucket):  # the wrapper refuses annotations that are strings, as they are in this file
        num_reduced.add_(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer() / num_processes, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    encoder.register_comm_hook(None, average)
    own = [tensor.tensor_split(num_processes)[rank] for tensor in batch]
    num_trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    for _ in range(2):  # the wrapper arranges its buckets anew after the first step
        num_reduced.zero_()
        with patch("cliprd_core.objective.gather_row_counts", side_effect=AssertionError("a step must not wait for the others' counts")):
            found_losses, found = gradients_of(GradCache(module, encoder, 2, torch.device("cpu")), module, own)
        assert num_reduced == num_trainable, "each gradient once, though there are three micro batches"
        torch.testing.assert_close(found_losses["total"], expected_losses["total"], rtol=1e-9, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()))
    check_running_statistics(rank)
    check_masked_term(rank)
    distributed.all_reduce_sum(torch.zeros(1))  # so that none leaves before the others are done
    distributed.shutdown()


def test_two_processes_exchange_gradients_once() -> None:
    run_processes(check_one_exchange, 2)


def masked_alike(images: torch.Tensor, *_: Any) -> torch.Tensor:
    """In place of random masks, which every process draws for itself."""
    return images * (images > 0)


def check_every_term(rank: int, num_processes: int, port: int) -> None:
    """Gradients of micro batches in a group equal those of one process on the whole batch, of one teacher and of two."""
    cases = [(EVERY_TERM, (24,))]
    cases += [(EVERY_TERM.model_copy(update={"teacher_combination": combination}), (16, 8)) for combination in TeacherCombination]
    batch = make_batch(12)
    with patch("cliprd_core.step_module.mask_patches", masked_alike):
        expected = []
        for weights, teacher_widths in cases:
            module = make_module(weights, teacher_widths=teacher_widths)
            expected.append(gradients_of(WholeBatch(module), module, batch))
        join_group(rank, num_processes, port)
        own = [tensor.tensor_split(num_processes)[rank] for tensor in batch]
        for (weights, teacher_widths), (whole, gradients) in zip(cases, expected, strict=True):
            module = make_module(weights, teacher_widths=teacher_widths)
            encoder = DistributedDataParallel(FeatureEncoder(module), gradient_as_bucket_view=True)
            losses_of_group, found = gradients_of(GradCache(module, encoder, 3, torch.device("cpu")), module, own)
            for key in ("total", "terms", "weighted"):
                torch.testing.assert_close(losses_of_group[key], whole[key], rtol=1e-9, atol=1e-12)
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()))
    distributed.all_reduce_sum(torch.zeros(1))  # so that none leaves before the others are done
    distributed.shutdown()


@pytest.mark.parametrize("num_processes", [2, 3])
def test_micro_batches_in_a_group_have_the_gradients_of_one_process_for_every_term(num_processes: int) -> None:
    run_processes(check_every_term, num_processes)
