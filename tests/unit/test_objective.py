"""The blocked objective: against the record, the dense functions and NumPy; its numerics, its memory, its errors."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cliprd_core import losses, objective_features
from cliprd_core.objective import Objective, ObjectiveOutput
from cliprd_core.objective_similarity import Similarity
from cliprd_core.objective_spec import ObjectiveSpec, ScaleMode
from tests.unit import numpy_objective as oracle

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
PAPER = ObjectiveSpec()
TERMS = ("task", "fd", "icl", "hrd", "vrd", "xrd", "soft", "gd", "afd")
STUDENT_FEATURES = ("student_image", "student_text", "student_masked_image")
VERTICAL = ("vrd_kl", "vrd_ce_image", "vrd_ce_text")
ONE_BLOCK, MANY_BLOCKS = 2**21, 50


def make_features(num_pairs: int, student_width: int, teacher_width: int, seed: int = 0) -> dict[str, Tensor]:
    """Pairs that resemble each other, so that no term is trivially flat or saturated."""
    generator = torch.Generator().manual_seed(seed)

    def features(width: int) -> Tensor:
        return torch.randn(num_pairs, width, generator=generator, dtype=torch.float64)

    student, teacher = features(student_width), features(teacher_width)
    return {
        "student_image_features": (student + 0.7 * features(student_width)).requires_grad_(),
        "student_text_features": (student + 0.7 * features(student_width)).requires_grad_(),
        "teacher_image_features": teacher + 0.5 * features(teacher_width),
        "teacher_text_features": teacher + 0.5 * features(teacher_width),
    }


def make_objective(weights: ObjectiveSpec, student_width: int, teacher_width: int, max_block_elements: int = MANY_BLOCKS) -> Objective:
    torch.manual_seed(0)
    return Objective(
        weights,
        student_width=student_width,
        teacher_width=teacher_width,
        teacher_logit_scale=40.0,
        max_block_elements=max_block_elements,
    ).double()


def gradients(output: Tensor, features: dict[str, Tensor], scale: Tensor, objective: Objective) -> dict[str, Tensor]:
    inputs = {name: tensor for name, tensor in features.items() if tensor.requires_grad}
    inputs |= {"student_logit_scale": scale, **dict(objective.named_parameters())}
    found = torch.autograd.grad(output, list(inputs.values()), allow_unused=True)
    return {name: torch.zeros_like(inputs[name]) if grad is None else grad for name, grad in zip(inputs, found, strict=True)}


def dense_terms(objective: Objective, features: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """What `objective` must come to, from the dense functions."""
    raw = (features["student_image_features"], features["student_text_features"])
    own = tuple(losses.unit_rows(one) for one in raw)
    matched = own
    if objective.image_projection is not None and objective.text_projection is not None:
        matched = (losses.unit_rows(objective.image_projection(raw[0])), losses.unit_rows(objective.text_projection(raw[1])))
    teacher = (losses.unit_rows(features["teacher_image_features"]), losses.unit_rows(features["teacher_text_features"]))
    weights, terms = objective.weights, {}
    if weights.task:
        terms["task"] = losses.task(*own, student_logit_scale=scale)
    if weights.fd:
        terms["fd"] = losses.fd(*matched, *teacher)
    if weights.hrd:
        assert objective.teacher_logit_scale is not None
        terms["hrd"] = losses.hrd(*own, *teacher, student_logit_scale=scale, teacher_logit_scale=objective.teacher_logit_scale)
    if weights.icl:
        assert objective.cross_scale is not None
        terms["icl"] = losses.icl(*matched, *teacher, cross_scale=objective.cross_scale)
    if weights.xrd:
        assert objective.cross_scale is not None
        terms["xrd"] = losses.xrd(*matched, *teacher, cross_scale=objective.cross_scale)
    if weights.soft:
        teacher_scale = objective.teacher_logit_scale if weights.soft_temperature is None else 1 / weights.soft_temperature
        assert teacher_scale is not None
        terms["soft"] = losses.soft(*own, *teacher, student_logit_scale=scale, teacher_scale=teacher_scale)
    if weights.gd:
        assert objective.teacher_logit_scale is not None
        terms["gd"] = losses.gd(*matched, *teacher, student_logit_scale=scale, teacher_logit_scale=objective.teacher_logit_scale)
    if weights.afd:
        assert objective.image_fusion is not None
        assert objective.text_fusion is not None
        assert objective.fusion_scale is not None
        fused_image = losses.unit_rows(objective.image_fusion(torch.cat((own[0], teacher[0]), dim=1)))
        fused_text = losses.unit_rows(objective.text_fusion(torch.cat((own[1], teacher[1]), dim=1)))
        terms["afd"] = losses.afd(fused_image, fused_text, fusion_scale=objective.fusion_scale)
    if weights.vrd:
        assert objective.image_scale is not None
        assert objective.text_scale is not None
        image_scale, text_scale = objective.image_scale, objective.text_scale
        terms["vrd_kl"] = losses.vrd_kl(*matched, *teacher, image_scale=image_scale, text_scale=text_scale)
        terms["vrd_ce_image"] = losses.vrd_ce_image(matched[0], teacher[0], image_scale=image_scale)
        terms["vrd_ce_text"] = losses.vrd_ce_text(matched[1], teacher[1], text_scale=text_scale)
        terms["vrd"] = terms["vrd_kl"] + terms["vrd_ce_image"] + terms["vrd_ce_text"]
    return terms


@pytest.mark.parametrize("max_block_elements", [ONE_BLOCK, MANY_BLOCKS])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path, max_block_elements: int) -> None:
    data = np.load(path)
    meta = json.loads(str(data["meta"]))
    features = {name: torch.from_numpy(data[name]) for name in data.files if name != "meta"}
    expected = {name: features.pop(f"grad_{name}") for name in ("student_image_features", "student_text_features")}
    width = features["student_image_features"].shape[1]
    objective = Objective(
        ObjectiveSpec(task=1.0, **meta["weights"]),
        student_width=width,
        teacher_width=width,
        teacher_logit_scale=meta["teacher_logit_scale"],
        max_block_elements=max_block_elements,
    ).double()
    for name in expected:
        features[name].requires_grad_()
    log_scale = torch.tensor(meta["student_logit_scale"], dtype=torch.float64).log().requires_grad_()
    output = objective(**features, student_logit_scale=log_scale.exp())
    output.loss.backward()

    assert output.total.item() == pytest.approx(meta["total"], rel=1e-6)
    assert output.loss.item() == pytest.approx(meta["total"], rel=1e-6)
    active = {part: value for part, value in meta["weighted_losses"].items() if value}
    assert {part: output.weighted[part].item() for part in active} == pytest.approx(active, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(features[name].grad, gradient, rtol=1e-6, atol=1e-12)
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(meta["grad_log_student_logit_scale"], rel=1e-6)
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.item() == pytest.approx(meta["grad_scales"][name.replace("scale", "logit_scale")], rel=1e-6)


SUBSETS = [{term} for term in TERMS] + [{"task", "fd"}, {"icl", "xrd"}, {"hrd", "fd"}, {"vrd", "hrd", "icl"}, set(TERMS)]


@pytest.mark.parametrize("max_block_elements", [ONE_BLOCK, MANY_BLOCKS, 1])
@pytest.mark.parametrize("teacher_width", [6, 9], ids=["equal_widths", "projected"])
@pytest.mark.parametrize("active", SUBSETS, ids=lambda active: "+".join(sorted(active)))
def test_equals_dense(active: set[str], teacher_width: int, max_block_elements: int) -> None:
    weights = ObjectiveSpec(**{term: 0.5 + index if term in active else 0.0 for index, term in enumerate(TERMS)})
    objective = make_objective(weights, 6, teacher_width, max_block_elements)
    features = make_features(13, 6, teacher_width)
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    output = objective(**features, student_logit_scale=scale)
    expected = dense_terms(objective, features, scale)

    assert set(output.terms) == set(output.weighted) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(output.terms[name], value.detach(), rtol=1e-9, atol=1e-12)
    total = sum((getattr(weights, name) * value for name, value in expected.items() if name in TERMS), torch.zeros(()))
    torch.testing.assert_close(output.total, total.detach(), rtol=1e-9, atol=1e-12)
    blocked, dense = (gradients(one, features, scale, objective) for one in (output.loss, total))
    for name, gradient in dense.items():
        torch.testing.assert_close(blocked[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


weight = st.sampled_from([0.0, 0.25, 1.0, 30.0])

HARD_ROWS = ("zero", "duplicate", "identical")


@st.composite
def hard_rows(draw: st.DrawFn, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mostly `rows` themselves; else some are zero, or two are equal, or all are."""
    rows = rows.copy()
    kind = draw(st.sampled_from([None, None, *HARD_ROWS]))
    first, second = (draw(st.integers(0, len(rows) - 1)) for _ in range(2))
    if kind == "zero":
        rows[[first, second]] = 0
    elif kind == "duplicate":
        rows[first] = rows[second]
    elif kind == "identical":
        rows[:] = rows[0]
    return rows


Problem = tuple[oracle.Variables, oracle.Teacher, dict[str, float], int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_pairs, student_width, teacher_width = draw(st.integers(1, 9)), draw(st.integers(2, 5)), draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    projections = [None, None] if student_width == teacher_width else generator.normal(size=(2, teacher_width, student_width))
    variables = oracle.Variables(
        generator.normal(size=(num_pairs, student_width)) * draw(st.sampled_from([1e-3, 1.0, 1e3])),
        generator.normal(size=(num_pairs, student_width)),
        draw(st.floats(0.0, math.log(100.0))),
        *(draw(st.floats(-3.0, 15.0)) for _ in range(3)),
        *projections,
    )
    variables.fusion_scale = draw(st.floats(0.1, 4.5))
    fusions = generator.normal(size=(2, student_width, student_width + teacher_width + 1))
    variables.image_fusion, variables.text_fusion = fusions[:, :, 1:]
    variables.image_fusion_bias, variables.text_fusion_bias = fusions[:, :, 0]
    variables.exponentiated = draw(st.booleans())
    if variables.exponentiated:  # inside the clamp, also when moved a little
        variables = replace(variables, **{name: draw(st.floats(0.1, 4.5)) for name in ("cross_scale", "image_scale", "text_scale")})
    variables.student_masked_image = generator.normal(size=(num_pairs, student_width))
    variables = replace(variables, **{name: draw(hard_rows(getattr(variables, name))) for name in STUDENT_FEATURES})
    teacher = [draw(hard_rows(rows)) for rows in generator.normal(size=(2, num_pairs, teacher_width))]
    if draw(st.sampled_from([False, False, False, True])):  # opposite
        variables.student_text, teacher[1] = -variables.student_image, -teacher[0]
    weights = draw(st.fixed_dictionaries(dict.fromkeys(TERMS, weight)).filter(lambda drawn: any(drawn.values())))
    weights |= {"mfd": draw(weight)}
    if draw(st.booleans()):
        weights |= {part: draw(weight) for part in VERTICAL}
        weights["task"] = 1.0  # so that something is left where the parts are all 0
    temperature = draw(st.none() | st.floats(0.01, 2.0))
    return variables, oracle.Teacher(*teacher, draw(st.floats(1.0, 100.0)), temperature), weights, draw(st.integers(1, 60))


def run_problem(
    variables: oracle.Variables,
    teacher: oracle.Teacher,
    weights: dict[str, float],
    max_block_elements: int,
    *,
    rows: slice = slice(None),
    row_counts: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[ObjectiveOutput, dict[str, Tensor]]:
    """Ours of this rank's rows, with the gradient for each of the oracle's variables that has one."""
    objective = Objective(
        ObjectiveSpec(
            **weights, soft_temperature=teacher.soft_temperature, scale_mode=ScaleMode.EXP if variables.exponentiated else ScaleMode.RAW
        ),
        student_width=variables.student_image.shape[1],
        teacher_width=teacher.image.shape[1],
        teacher_logit_scale=teacher.logit_scale,
        max_block_elements=max_block_elements,
    ).double()
    learned = {name.removesuffix(".weight").replace(".", "_"): parameter for name, parameter in objective.named_parameters()}
    for name, parameter in learned.items():
        parameter.data.copy_(torch.as_tensor(getattr(variables, name), dtype=torch.float64))
    student = {name: torch.from_numpy(getattr(variables, name)[rows]).to(dtype, copy=True).requires_grad_() for name in STUDENT_FEATURES}
    log_scale = torch.tensor(variables.log_student_logit_scale, dtype=torch.float64, requires_grad=True)
    output = objective(
        student_image_features=student["student_image"],
        student_text_features=student["student_text"],
        student_logit_scale=log_scale.exp(),
        teacher_image_features=torch.from_numpy(teacher.image[rows]).to(dtype),
        teacher_text_features=torch.from_numpy(teacher.text[rows]).to(dtype),
        student_masked_image_features=student["student_masked_image"],
        row_counts=row_counts,
    )
    output.loss.backward()
    leaves = {**student, **learned, "log_student_logit_scale": log_scale}
    return output, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_equals_numpy(problem: Problem) -> None:
    """Values, and the derivative along a random direction by central differences."""
    variables, teacher, weights, max_block_elements = problem
    output, found = run_problem(variables, teacher, weights, max_block_elements)
    expected = oracle.terms(variables, teacher)
    if any(weights.get(part) == 0 for part in VERTICAL):
        expected["vrd"] = sum(expected[part] for part in VERTICAL if part in output.terms)
    for name, value in output.terms.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-10)

    generator = np.random.default_rng(0)
    size = {name: np.abs(getattr(variables, name)).mean() for name in STUDENT_FEATURES}
    direction = {name: generator.normal(size=grad.shape) * size.get(name, 1.0) for name, grad in found.items()}
    for name in direction.keys() & set(STUDENT_FEATURES):
        is_zero = ~getattr(variables, name).any(axis=1)  # such a row has no direction, and a gradient of zero
        direction[name][is_zero] = 0
        assert not found[name][is_zero].any()

    def along(step: float) -> float:
        moved = replace(variables, **{name: getattr(variables, name) + step * one for name, one in direction.items()})
        return oracle.total(moved, teacher, part_weights, frozen=variables)

    part_weights = ObjectiveSpec(**weights).part_weights | {"mfd": weights["mfd"]}

    step = 1e-5
    numeric = (along(step) - along(-step)) / (2 * step)
    analytic = sum(float((grad.numpy() * direction[name]).sum()) for name, grad in found.items())
    assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-5 * (1 + abs(output.total.item())))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_features_of_any_precision_have_the_values_of_numpy(problem: Problem, dtype: torch.dtype) -> None:
    """All is computed in float32. The features' own rounding is not ours: NumPy gets the rounded ones."""
    variables, teacher, weights, max_block_elements = problem

    def rounded(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        numbers: NDArray[np.float64] = torch.from_numpy(rows).to(dtype).double().numpy()
        return numbers

    output, found = run_problem(variables, teacher, weights, max_block_elements, dtype=dtype)
    expected = oracle.terms(
        replace(variables, **{name: rounded(getattr(variables, name)) for name in STUDENT_FEATURES}),
        replace(teacher, image=rounded(teacher.image), text=rounded(teacher.text)),
    )
    for name in output.terms.keys() - {"vrd"}:
        assert output.terms[name].item() == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    assert output.loss.dtype == torch.float32
    assert all(found[name].dtype == dtype for name in STUDENT_FEATURES[:2] if name in found)


@pytest.mark.parametrize("active", [("vrd_kl",), ("vrd_ce_image",), ("vrd_ce_text",), ("vrd_kl", "vrd_ce_text"), VERTICAL])
@pytest.mark.parametrize("teacher_width", [6, 9], ids=["equal_widths", "projected"])
def test_parts_of_vrd_may_have_weights_of_their_own(active: tuple[str, ...], teacher_width: int) -> None:
    own = {part: 0.5 + index if part in active else 0.0 for index, part in enumerate(VERTICAL)}
    weights = ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | own))
    objective = make_objective(weights, 6, teacher_width)
    whole = make_objective(ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | {"vrd": 1.0})), 6, teacher_width)
    whole.load_state_dict(objective.state_dict(), strict=False)
    features, scale = make_features(11, 6, teacher_width), torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    output, dense = objective(**features, student_logit_scale=scale), dense_terms(whole, features, scale)
    assert set(output.terms) == {"vrd", *active}
    torch.testing.assert_close(output.terms["vrd"], sum((dense[part] for part in active), torch.zeros(())).detach())
    total = sum((own[part] * dense[part] for part in active), torch.zeros(()))
    torch.testing.assert_close(output.total, total.detach())
    torch.testing.assert_close(output.weighted["vrd"], output.total)
    found = gradients(output.loss, features, scale, objective)
    expected = gradients(total, features, scale, whole)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    objective(**features, student_logit_scale=scale).loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters()), "a data-parallel wrapper waits for each"


def test_exponentiated_scales_are_kept_within_the_clamp() -> None:
    objective = make_objective(ObjectiveSpec(scale_mode=ScaleMode.EXP), 6, 6)
    assert all(value.item() == pytest.approx(1 / 0.07) for value in objective.scales().values())
    assert objective.cross_scale is not None
    assert objective.image_scale is not None
    objective.cross_scale.data.fill_(7.0)
    objective.image_scale.data.fill_(-1.0)
    objective.clamp_scales()
    assert {name: value.item() for name, value in objective.scales().items()} == pytest.approx(
        {"cross_scale": 100.0, "image_scale": 1.0, "text_scale": 1 / 0.07}
    )


def test_soft_has_the_gradient_of_hrd_and_a_temperature_of_its_own() -> None:
    features, scale = make_features(9, 6, 6), torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    zero = dict.fromkeys(TERMS, 0.0)
    found = []
    for weights in ({"hrd": 1.0}, {"soft": 1.0}, {"soft": 1.0, "soft_temperature": 1 / 40}, {"soft": 1.0, "soft_temperature": 0.5}):
        objective = make_objective(ObjectiveSpec(**(zero | weights)), 6, 6)
        found.append(gradients(objective(**features, student_logit_scale=scale).loss, features, scale, objective))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[1], found[2])
    assert not torch.allclose(found[2]["student_image_features"], found[3]["student_image_features"])


def assert_finite(output: ObjectiveOutput, *leaves: Tensor) -> None:
    output.loss.backward()
    for name, value in {"loss": output.loss, "total": output.total, **output.terms}.items():
        assert value.isfinite(), name
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


CASES = ("plain", "zero_vectors", "duplicate_rows", "identical", "batch_of_1", "opposite", "large", "tiny")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def difficult_features(case: str, dtype: torch.dtype, teacher_width: int) -> dict[str, Tensor]:
    """Of a student of width 16 and its teacher; the student's need gradients."""
    double = make_features(1 if case == "batch_of_1" else 12, 16, teacher_width)
    features = {name: tensor.detach().clone() for name, tensor in double.items()}
    for tensor in features.values():
        if case == "zero_vectors":
            tensor[[0, 5]] = 0
        elif case == "duplicate_rows":
            tensor[1:7] = tensor[0]
        elif case == "identical":
            tensor[:] = tensor[0]
        elif case == "large":
            tensor.mul_(1e4)
        elif case == "tiny":
            tensor.mul_(1e-4)
    if case == "opposite":
        features["student_text_features"] = -features["student_image_features"]
        features["teacher_text_features"] = -features["teacher_image_features"]
    return {name: tensor.to(dtype).requires_grad_(name.startswith("student")) for name, tensor in features.items()}


@pytest.mark.parametrize("teacher_width", [16, 24], ids=["equal_widths", "projected"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_numerics(case: str, dtype: torch.dtype, teacher_width: int) -> None:
    """The scales are at their clamps: student and teacher 100."""
    features = difficult_features(case, dtype, teacher_width)
    objective = Objective(PAPER, student_width=16, teacher_width=teacher_width, teacher_logit_scale=100.0, max_block_elements=40)
    scale = torch.tensor(100.0, requires_grad=True)
    output = objective(**features, student_logit_scale=scale)
    assert output.loss.dtype == torch.float32
    assert_finite(output, features["student_image_features"], features["student_text_features"], scale, *objective.parameters())
    if case == "zero_vectors":
        gradient = features["student_image_features"].grad
        assert gradient is not None
        if teacher_width == 16:
            assert not gradient[[0, 5]].any()
        assert gradient[[1, 2]].any()


ALONE: dict[str, dict[str, float]] = {term: {term: 1.0} for term in (*TERMS, *VERTICAL)}
ALONE |= {"soft_sharp": {"soft": 1.0, "soft_temperature": 1e-2}, "soft_flat": {"soft": 1.0, "soft_temperature": 1e3}}
ALONE |= {"mfd": {"mfd": 1.0, "fd": 1.0}, "all": dict.fromkeys((*TERMS, "mfd"), 1.0)}
for weights in (ALONE["gd"], ALONE["all"]):
    weights["gd"] = 1e-3  # at 1, the true gradient for features of a norm of 4e-4 is beyond float16's range


@pytest.mark.parametrize("teacher_width", [16, 24], ids=["equal_widths", "projected"])
@pytest.mark.parametrize("active", ALONE)
def test_numerics_of_every_term(active: str, teacher_width: int) -> None:
    """Alone, with every scale at its upper clamp, and at its lower."""
    spec = ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | ALONE[active]), scale_mode=ScaleMode.EXP)
    for factor, case, dtype in itertools.product((100.0, 1.0), CASES, DTYPES):
        torch.manual_seed(0)
        objective = Objective(spec, student_width=16, teacher_width=teacher_width, teacher_logit_scale=100.0, max_block_elements=40)
        for name, parameter in objective.named_parameters():
            if name.endswith("_scale"):
                parameter.data.fill_(math.log(factor))
        features = difficult_features(case, dtype, teacher_width)
        scale = torch.tensor(factor, requires_grad=True)
        masked = features["student_image_features"].flip(0) if spec.mfd else None
        output = objective(**features, student_logit_scale=scale, student_masked_image_features=masked)
        output.loss.backward()
        leaves = {name: tensor for name, tensor in features.items() if name.startswith("student")}
        leaves |= {"student_logit_scale": scale, **dict(objective.named_parameters())}
        values = {"loss": output.loss, "total": output.total, **output.terms}
        values |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        assert [name for name, value in values.items() if not value.isfinite().all()] == [], (factor, case, dtype)
        assert any(name.startswith("gradient of student_") for name in values)
        assert all(parameter.grad is not None for parameter in objective.parameters())


def test_low_precision_features_give_what_their_float32_values_give() -> None:
    features = make_features(12, 8, 8)
    objective = make_objective(PAPER, 8, 8).float()
    scale = torch.tensor(50.0)
    half = {name: tensor.detach().to(torch.bfloat16) for name, tensor in features.items()}
    single = {name: tensor.float() for name, tensor in half.items()}
    assert torch.equal(
        objective(**half, student_logit_scale=scale).total,
        objective(**single, student_logit_scale=scale).total,
    )


def test_autocast_changes_nothing() -> None:
    features = {name: tensor.detach().float() for name, tensor in make_features(12, 8, 10).items()}
    leaf = features["student_image_features"].requires_grad_()
    objective = make_objective(PAPER, 8, 10).float()
    found = []
    for is_enabled in (False, True):
        leaf.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            output = objective(**features, student_logit_scale=torch.tensor(50.0))
        output.loss.backward()
        found.append((output.total, leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-20, -2.0])
def test_learned_scales_may_cross_zero(value: float) -> None:
    """They are not exponentials, so nothing keeps them positive; at 0 their gradient is that of the dense form."""
    objective = make_objective(PAPER, 6, 6)
    for scale in (objective.cross_scale, objective.image_scale, objective.text_scale):
        assert scale is not None
        scale.data.fill_(value)
    features = make_features(9, 6, 6)
    student_scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    output = objective(**features, student_logit_scale=student_scale)
    expected = dense_terms(objective, features, student_scale)
    total = sum((getattr(PAPER, name) * term for name, term in expected.items() if name in TERMS), torch.zeros(()))
    blocked, dense = (gradients(one, features, student_scale, objective) for one in (output.loss, total))
    for name, gradient in dense.items():
        torch.testing.assert_close(blocked[name], gradient, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_gradient_scales_with_the_loss_and_accumulates() -> None:
    """As a gradient scaler and gradient accumulation need it."""
    features, objective = make_features(7, 5, 5), make_objective(PAPER, 5, 5)
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    once = gradients(objective(**features, student_logit_scale=scale).loss, features, scale, objective)
    scaled = gradients(objective(**features, student_logit_scale=scale).loss * 65536, features, scale, objective)
    for name, gradient in once.items():
        torch.testing.assert_close(scaled[name], gradient * 65536)
    for _ in range(2):
        objective(**features, student_logit_scale=scale).loss.backward()
    leaves = {**features, "student_logit_scale": scale, **dict(objective.named_parameters())}
    for name, gradient in once.items():
        torch.testing.assert_close(leaves[name].grad, gradient * 2)


def test_without_gradients() -> None:
    features, objective = make_features(7, 5, 5), make_objective(PAPER, 5, 5)
    scale = torch.tensor(10.0, dtype=torch.float64)
    with_gradients = objective(**features, student_logit_scale=scale)
    with torch.no_grad():
        without = objective(**features, student_logit_scale=scale)
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.terms, with_gradients.terms)


def test_parameters_are_those_that_active_terms_use() -> None:
    def names(**weights: float) -> set[str]:
        spec = ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | weights))
        return set(Objective(spec, student_width=4, teacher_width=6, teacher_logit_scale=1.0).state_dict())

    projections = {"image_projection.weight", "text_projection.weight"}
    assert names(task=1) == names(hrd=1) == names(soft=1) == set()
    assert names(fd=1) == names(gd=1) == projections
    assert names(icl=1) == names(xrd=1) == projections | {"cross_scale"}
    assert names(vrd=1) == projections | {"image_scale", "text_scale"}
    fusions = {f"{modality}_fusion.{one}" for modality in ("image", "text") for one in ("weight", "bias")}
    assert names(afd=1) == {"fusion_scale"} | fusions
    equal = Objective(PAPER, student_width=6, teacher_width=6, teacher_logit_scale=1.0)
    assert set(equal.state_dict()) == set(equal.scales()) == {"cross_scale", "image_scale", "text_scale"}
    assert all(scale.ndim == 0 and scale.item() == pytest.approx(math.log(1 / 0.07)) for scale in equal.scales().values())


@pytest.mark.parametrize(
    ("weights", "num_similarities"),
    [
        ({"fd": 1}, 0),
        ({"task": 1}, 1),
        ({"hrd": 1}, 2),
        ({"hrd": 1, "soft": 1}, 2),
        ({"hrd": 1, "soft": 1, "soft_temperature": 0.1}, 3),
        ({"icl": 1}, 2),
        ({"xrd": 1, "icl": 1}, 2),
        ({"vrd": 1}, 2),
        ({"vrd_ce_text": 1}, 1),
        ({"afd": 1}, 1),
        ({}, 6),
    ],
)
def test_shared_similarities_are_computed_once_and_inactive_ones_never(
    weights: dict[str, float], num_similarities: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | weights)) if weights else PAPER
    num_calls = 0
    original = Similarity.logits

    def counted(self: Similarity, block: slice) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return original(self, block)

    monkeypatch.setattr(Similarity, "logits", counted)
    make_objective(spec, 4, 4, max_block_elements=6 * 2)(**make_features(6, 4, 4), student_logit_scale=torch.tensor(10.0))
    assert num_calls == num_similarities * 3 * 2  # three blocks of two rows, two passes


@pytest.mark.parametrize(
    ("weights", "teacher_width", "num_calls"),
    [
        ({"gd": 1}, 4, 4 + 2),  # of S: columns' sums, features' gradients, then twice back through them; of T: the first two
        ({"task": 1, "gd": 1}, 4, 5 + 2),
        ({"hrd": 1, "gd": 1}, 4, 5 + 3),
        ({"soft": 1, "gd": 1}, 4, 5 + 3),
        ({"soft": 1, "soft_temperature": 0.1, "gd": 1}, 4, 5 + 2 + 2),
        (PAPER.model_dump(exclude_none=True) | {"gd": 1}, 4, 12 + 3 + 1),
        ({"hrd": 1, "gd": 1}, 6, 2 + 4 + 3),  # S of the student's own width is another matrix; T is the same
    ],
)
def test_gd_shares_similarities_and_their_columns_sums(
    weights: dict[str, Any], teacher_width: int, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | weights))
    calls: list[Similarity] = []
    original = Similarity.logits
    monkeypatch.setattr(Similarity, "logits", lambda self, block: calls.append(self) or original(self, block))
    objective = make_objective(spec, 4, teacher_width, max_block_elements=6 * 2)
    objective(**make_features(6, 4, teacher_width), student_logit_scale=torch.tensor(10.0))
    assert len(calls) == num_calls * 3  # three blocks of two rows


class MatrixProducts(TorchDispatchMode):
    """How many there were inside it."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("weights", "num_products"),
    [
        ({"vrd_kl": 1}, 4 + 1),  # V_I and V_T in two passes, and the gradient of s_I: V_T is a target
        ({"vrd_kl": 1, "vrd_ce_image": 1}, 4 + 1),
        ({"vrd_kl": 1, "vrd_ce_text": 1}, 4 + 2),
        ({"vrd_ce_text": 1}, 2 + 1),
        ({"hrd": 1}, 4 + 2),
        ({"task": 1}, 2 + 2),
        ({"icl": 1}, 4 + 2),
        ({"xrd": 1}, 4 + 2),
        ({}, 12 + 6),
    ],
)
def test_only_what_a_term_teaches_has_gradient_products(weights: dict[str, float], num_products: int) -> None:
    spec = ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | weights)) if weights else PAPER
    objective = make_objective(spec, 4, 4, max_block_elements=6 * 2)
    features, scale = make_features(6, 4, 4), torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    with MatrixProducts() as products:
        objective(**features, student_logit_scale=scale).loss.backward()
    assert products.num == num_products * 3  # three blocks of two rows


@pytest.mark.parametrize(
    ("weights", "teacher_width", "num_gathers"),
    [
        ({"fd": 1}, 6, 0),
        ({"task": 1}, 6, 1),
        ({"hrd": 1}, 6, 2),
        ({"soft": 1}, 6, 2),
        ({"gd": 1}, 6, 2),
        ({"icl": 1}, 6, 2),
        ({"xrd": 1}, 6, 2),
        ({"vrd_ce_image": 1}, 6, 1),
        ({"vrd_ce_text": 1}, 6, 1),
        ({"afd": 1}, 6, 1),
        (PAPER.model_dump(exclude_none=True), 4, 3),
        (PAPER.model_dump(exclude_none=True), 6, 4),
    ],
)
def test_only_what_active_terms_need_is_gathered(
    weights: dict[str, Any], teacher_width: int, num_gathers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[Tensor] = []
    monkeypatch.setattr(objective_features, "gather_with_grad", lambda x, _: gathered.append(x) or x)
    objective = make_objective(ObjectiveSpec(**(dict.fromkeys(TERMS, 0.0) | weights)), 4, teacher_width)
    objective(**make_features(6, 4, teacher_width), student_logit_scale=torch.tensor(10.0))
    assert len(gathered) == len({id(one) for one in gathered}) == num_gathers


def test_plain_clip_needs_no_teacher() -> None:
    objective = Objective(ObjectiveSpec(task=1, fd=0, icl=0, hrd=0, vrd=0, xrd=0), student_width=4)
    student = {name: tensor for name, tensor in make_features(5, 4, 4).items() if name.startswith("student")}
    output = objective(**student, student_logit_scale=torch.tensor(10.0))
    assert set(output.terms) == {"task"}
    torch.testing.assert_close(output.total, output.terms["task"])


def test_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match="teacher_width"):
        Objective(PAPER, student_width=4)
    with pytest.raises(ValueError, match="teacher_logit_scale"):
        Objective(PAPER, student_width=4, teacher_width=4)
    objective, features, scale = make_objective(PAPER, 4, 4), make_features(5, 4, 4), torch.tensor(10.0)
    with pytest.raises(ValueError, match=r"teacher_text_features.*missing"):
        objective(**(features | {"teacher_text_features": None}), student_logit_scale=scale)
    with pytest.raises(ValueError, match=r"student_text_features.*\(5, 4\).*\(4, 4\)"):
        objective(**(features | {"student_text_features": torch.zeros(4, 4)}), student_logit_scale=scale)
    with pytest.raises(ValueError, match=r"teacher_image_features.*\(5, 4\).*\(5, 3\)"):
        objective(**(features | {"teacher_image_features": torch.zeros(5, 3)}), student_logit_scale=scale)
    with pytest.raises(ValueError, match="student_logit_scale"):
        objective(**features, student_logit_scale=torch.ones(2))
