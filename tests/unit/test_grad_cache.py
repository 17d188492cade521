"""Micro batches with the whole batch's negatives: the gradients are the whole batch's, in the memory of one micro batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from cliprd_core import grad_cache
from cliprd_core.grad_cache import FeatureEncoder, GradCache, encode_in_micro_batches, micro_batch_sizes, micro_batches
from cliprd_core.models import load_student
from cliprd_core.objective_spec import ObjectiveSpec
from cliprd_core.spec import StudentSpec
from cliprd_core.step_module import Passes, StepLosses, StudentWithObjective, WholeBatch
from cliprd_core.teacher_ensemble import TeacherShape, build_objective
from cliprd_core.training_spec import TrainingSpec
from tests.tiny import CONTEXT_LENGTH, MODEL_IMAGE_SIZE, tiny_config

NUM_PAIRS = 10
TEACHER_WIDTH = 24
PAPER = ObjectiveSpec()
EQUAL_WEIGHTS = ObjectiveSpec(fd=1)
EVERY_TERM = ObjectiveSpec(fd=1, soft=1, soft_temperature=0.1, gd=1e-3, afd=1, mfd=1)
FD_ONLY = ObjectiveSpec(task=0, fd=1, icl=0, hrd=0, vrd=0, xrd=0)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
AUTOCASTS = [
    ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.bfloat16, marks=NEEDS_GPU),
    pytest.param("cuda", torch.float16, marks=NEEDS_GPU),
]


def make_module(
    weights: ObjectiveSpec = EQUAL_WEIGHTS,
    *,
    is_random: bool = False,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    autocast_type: torch.dtype | None = None,
    device: str = "cpu",
    teacher_widths: Sequence[int] = (TEACHER_WIDTH,),
) -> StudentWithObjective:
    """A student of one layer per modality and its objective. `is_random`: with patch dropout, and dropout in both modalities.

    `teacher_widths` add up to TEACHER_WIDTH.
    """
    config = config or tiny_config(width=16, embed_dim=16)
    if is_random:
        config["vision_cfg"]["patch_dropout"] = 0.5
    student = load_student(StudentSpec(config=config), seed=0).model
    if is_random:
        student.visual.ln_post = nn.Sequential(student.visual.ln_post, nn.Dropout(0.3))
        student.ln_final = nn.Sequential(student.ln_final, nn.Dropout(0.3))
    if not (weights.task or weights.hrd):
        student.logit_scale.requires_grad_(False)
    torch.manual_seed(0)
    teachers = [TeacherShape(width, 40.0 - 10 * index) for index, width in enumerate(teacher_widths)]
    objective = build_objective(weights, student_width=config["embed_dim"], teachers=teachers)
    return StudentWithObjective(student, objective, autocast_type).to(device, dtype)


def make_batch(num_pairs: int = NUM_PAIRS, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """Images, tokens, and the teacher's features of both."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_pairs, 3, MODEL_IMAGE_SIZE, MODEL_IMAGE_SIZE, generator=generator).to(device, dtype)
    tokens = torch.randint(1, 49408, (num_pairs, CONTEXT_LENGTH), generator=generator).to(device)
    teacher = torch.randn(2, num_pairs, TEACHER_WIDTH, generator=generator).to(device, dtype)
    return [images, tokens, *teacher]


def cached(module: StudentWithObjective, micro_batch_size: int) -> GradCache:
    return GradCache(module, FeatureEncoder(module), micro_batch_size, module.student.logit_scale.device)


class KeptGraphs:
    """What micro batches must come to: the same forward passes with the same random numbers, but all graphs kept, one backward."""

    def __init__(self, module: StudentWithObjective, micro_batch_size: int) -> None:
        self._module = module
        self.micro_batch_size = micro_batch_size

    def forward(self, images: Tensor, tokens: Tensor, *teacher: Tensor | None) -> StepLosses:
        features = encode_in_micro_batches(self._module.encode, images, tokens, self.micro_batch_size, images.device)
        return self._module.losses(features, *teacher)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)


def gradients_of(passes: Passes, module: nn.Module, batch: list[Tensor], *, factor: float = 1.0) -> tuple[StepLosses, dict[str, Tensor]]:
    module.zero_grad()
    torch.manual_seed(5)
    losses = passes.forward(*batch)
    passes.backward(losses["loss"] * factor)
    return losses, {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_equal_steps(
    found: tuple[StepLosses, dict[str, Tensor]], expected: tuple[StepLosses, dict[str, Tensor]], *, rtol: float = 1e-6
) -> None:
    """Gradients within `rtol` of each other, relative to the largest element of each parameter's gradient."""
    for key in ("loss", "total", "terms", "weighted"):
        torch.testing.assert_close(found[0][key], expected[0][key], rtol=rtol, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            found[1][name], gradient, rtol=0, atol=rtol * float(gradient.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, NUM_PAIRS, 64])
def test_gradients_are_the_whole_batchs(micro_batch_size: int, device: str) -> None:
    """Without randomness, against the student on all pairs at once; 3 doesn't divide the 10 pairs."""
    module, batch = make_module(PAPER, device=device), make_batch(device=device)
    expected = gradients_of(WholeBatch(module), module, batch)
    assert "objective.image_projection.weight" in expected[1]
    assert "student.logit_scale" in expected[1]
    assert_equal_steps(gradients_of(cached(module, micro_batch_size), module, batch), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", [EQUAL_WEIGHTS, EVERY_TERM], ids=["paper", "every_term"])
@pytest.mark.parametrize("micro_batch_size", [1, 4, NUM_PAIRS])
def test_random_layers_draw_the_same_in_both_passes(
    micro_batch_size: int, weights: ObjectiveSpec, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch = make_module(weights, is_random=True, device=device), make_batch(device=device)
    expected = gradients_of(KeptGraphs(module, micro_batch_size), module, batch)
    assert_equal_steps(gradients_of(cached(module, micro_batch_size), module, batch), expected)
    monkeypatch.setattr(grad_cache._GeneratorState, "restore", lambda *_: None)
    with pytest.raises(AssertionError, match="student"):
        assert_equal_steps(gradients_of(cached(module, micro_batch_size), module, batch), expected)


def test_an_objective_without_learned_parameters() -> None:
    config = tiny_config(width=16, embed_dim=TEACHER_WIDTH)
    module, batch = make_module(FD_ONLY, config=config), make_batch()
    expected = gradients_of(WholeBatch(module), module, batch)
    assert not [name for name in expected[1] if "logit_scale" in name or name.startswith("objective")]
    assert_equal_steps(gradients_of(cached(module, 3), module, batch), expected)


def test_gradients_are_added_to_those_that_are_there() -> None:
    module, batch = make_module(), make_batch()
    passes = cached(module, 4)
    _, once = gradients_of(passes, module, batch)
    once = {name: gradient.clone() for name, gradient in once.items()}
    passes.backward(passes.forward(*batch)["loss"])
    for name, parameter in module.named_parameters():
        if name in once:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_a_gradient_scaler_s_factor_goes_through() -> None:
    module, batch = make_module(dtype=torch.float32), make_batch(dtype=torch.float32)
    _, expected = gradients_of(cached(module, 4), module, batch)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    passes = cached(module, 4)
    module.zero_grad()
    losses = passes.forward(*batch)
    passes.backward(scaler.scale(losses["loss"]))
    name, parameter = next((name, parameter) for name, parameter in module.named_parameters() if name == "student.text_projection")
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, expected[name] * 2.0**12)
    scaler.unscale_(optimizer)
    for name, parameter in module.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(("device", "autocast_type"), AUTOCASTS)
def test_autocast_casts_alike_in_both_passes(device: str, autocast_type: torch.dtype) -> None:
    """Both sides compute in the lower precision; only sums over micro batches, in fp32, may round otherwise."""
    module = make_module(is_random=True, dtype=torch.float32, autocast_type=autocast_type, device=device)
    batch = make_batch(dtype=torch.float32, device=device)
    factor = 1024.0 if autocast_type is torch.float16 else 1.0
    expected = gradients_of(KeptGraphs(module, 4), module, batch, factor=factor)
    assert_equal_steps(gradients_of(cached(module, 4), module, batch, factor=factor), expected, rtol=1e-5)
    in_fp32 = make_module(is_random=True, dtype=torch.float32, device=device)
    assert gradients_of(cached(in_fp32, 4), in_fp32, batch)[0]["total"] != expected[0]["total"], "the student does run under autocast"


def test_batch_normalisation_counts_each_micro_batch_once() -> None:
    """It normalises over a micro batch; running statistics move as in one forward pass over each."""
    config = tiny_config(width=16, embed_dim=16)
    config["vision_cfg"] = {"image_size": MODEL_IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    steps = []
    for passes_of in (KeptGraphs, cached):
        module = make_module(config=config)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.ones_(layer.weight)  # open_clip starts each block's last at 0, and no gradient would pass
        step = gradients_of(passes_of(module, 5), module, make_batch())
        steps.append((step, dict(module.named_buffers()), module))
    (expected, expected_buffers, _), (found, found_buffers, module) = steps
    assert_equal_steps(found, expected)
    assert found_buffers["student.visual.bn1.num_batches_tracked"] == 2
    torch.testing.assert_close(found_buffers, expected_buffers, rtol=1e-12, atol=0)
    assert all(layer.track_running_stats for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)), "put back as it was"


class _Saved:
    """A tensor kept for the backward pass; counts itself as long as it lives."""

    num_bytes = 0
    peak_bytes = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._size = tensor.numel() * tensor.element_size()
        _Saved.num_bytes += self._size
        _Saved.peak_bytes = max(_Saved.peak_bytes, _Saved.num_bytes)

    def __del__(self) -> None:
        _Saved.num_bytes -= self._size


def peak_saved_bytes(passes: Passes, module: nn.Module, batch: list[Tensor]) -> int:
    """The most bytes of activations kept for a backward pass at any moment of a step; parameters and their views aside."""
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor: Tensor) -> Tensor | _Saved:
        return tensor if tensor.untyped_storage().data_ptr() in storages else _Saved(tensor)

    def give_back(kept: Tensor | _Saved) -> Tensor:
        return kept.tensor if isinstance(kept, _Saved) else kept

    assert _Saved.num_bytes == 0
    _Saved.peak_bytes = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        gradients_of(passes, module, batch)
    return _Saved.peak_bytes


def test_one_micro_batch_s_activations_are_alive_at_a_time() -> None:
    """Eight micro batches take no more memory than one alone, where the whole batch takes eight times as much."""
    module, size = make_module(), 4
    large, small = make_batch(8 * size), make_batch(size)
    one = peak_saved_bytes(WholeBatch(module), module, small)
    assert peak_saved_bytes(WholeBatch(module), module, large) > 6 * one
    features = 8 * size * (16 + TEACHER_WIDTH) * 2 * 8  # of all pairs, both modalities, in fp64: these are kept by design
    assert peak_saved_bytes(cached(module, size), module, large) < one + 4 * features


def test_the_student_never_sees_more_pairs_than_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = make_module(), []
    encode_image: Callable[[Tensor], Tensor] = module.student.encode_image
    monkeypatch.setattr(module.student, "encode_image", lambda images: seen.append(len(images)) or encode_image(images))
    gradients_of(cached(module, 4), module, make_batch())
    assert seen == [4, 3, 3, 4, 3, 3], "each pair twice, in parts as even as can be"


@given(num_pairs=st.integers(1, 500), size=st.integers(1, 600))
def test_micro_batches_hold_every_pair_once_in_order_in_parts_as_few_and_even_as_can_be(num_pairs: int, size: int) -> None:
    images, tokens = torch.arange(num_pairs), torch.arange(num_pairs) + 100
    parts = list(micro_batches(images, tokens, size, torch.device("cpu")))
    lengths = [len(part) for part, _ in parts]
    assert lengths == micro_batch_sizes(num_pairs, size)
    assert len(lengths) == -(-num_pairs // size)
    assert max(lengths) == lengths[0] <= size
    assert max(lengths) - min(lengths) <= 1
    assert torch.cat([part for part, _ in parts]).equal(images)
    assert torch.cat([part for _, part in parts]).equal(tokens)


def test_the_field_in_the_spec() -> None:
    assert TrainingSpec().micro_batch_size is None
    assert TrainingSpec(micro_batch_size=3).micro_batch_size == 3, "it need not divide the batch"
    with pytest.raises(ValidationError, match="micro_batch_size"):
        TrainingSpec(micro_batch_size=0)
