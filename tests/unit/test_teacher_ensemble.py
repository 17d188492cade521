"""Several teachers at once, against the formulas written out on whole matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cliprd_core import objective_features
from cliprd_core.losses import unit_rows
from cliprd_core.objective import Objective, ObjectiveOutput
from cliprd_core.objective_similarity import Similarity
from cliprd_core.objective_spec import ObjectiveSpec, TeacherCombination
from cliprd_core.teacher_ensemble import TeacherEnsemble, TeacherShape, build_objective
from tests.unit import numpy_objective as oracle
from tests.unit.numpy_objective import Matrix
from tests.unit.peak_bytes import PeakBytes
from tests.unit.test_objective import hard_rows

NUM_PAIRS, STUDENT_WIDTH = 9, 6
TEACHERS = [TeacherShape(6, 30.0), TeacherShape(10, 55.0), TeacherShape(4, 12.0)]
NONE = {"task": 0.0, "fd": 0.0, "icl": 0.0, "hrd": 0.0, "vrd": 0.0, "xrd": 0.0}
EVERYTHING = {"fd": 7.0, "vrd_kl": 0.5, "mfd": 3.0, "soft": 0.4, "gd": 0.01, "afd": 0.3}


def weights(combination: TeacherCombination | str, **values: float) -> ObjectiveSpec:
    return ObjectiveSpec(**{**NONE, **values, "teacher_combination": combination})


def ensemble(spec: ObjectiveSpec, teachers: list[TeacherShape] = TEACHERS) -> TeacherEnsemble:
    torch.manual_seed(0)
    built = build_objective(spec, student_width=STUDENT_WIDTH, teachers=teachers)
    assert isinstance(built, TeacherEnsemble)
    return built.double()


class Features:
    """Float64 features of a student and of some teachers; the same numbers for the same teachers."""

    def __init__(self, teachers: list[TeacherShape] = TEACHERS, num_pairs: int = NUM_PAIRS) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(width: int) -> Tensor:
            return torch.randn(num_pairs, width, generator=generator, dtype=torch.float64)

        self.image, self.text, self.masked = (draw(STUDENT_WIDTH).requires_grad_() for _ in range(3))
        self.scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        self.teachers = [(3 * draw(teacher.width), 3 * draw(teacher.width)) for teacher in teachers]

    def run(self, objective: Objective | TeacherEnsemble, *, only: int | None = None) -> ObjectiveOutput:
        teachers = self.teachers if only is None else [self.teachers[only]]
        output: ObjectiveOutput = objective(
            student_image_features=self.image,
            student_text_features=self.text,
            student_logit_scale=self.scale,
            teacher_image_features=torch.cat([image for image, _ in teachers], dim=1),
            teacher_text_features=torch.cat([text for _, text in teachers], dim=1),
            student_masked_image_features=self.masked,
        )
        return output

    def gradients(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, [self.image, self.text, self.scale], retain_graph=True, allow_unused=True)
        return [torch.zeros(1) if one is None else one for one in found]

    @property
    def student_logits(self) -> Tensor:
        return self.scale * unit_rows(self.image) @ unit_rows(self.text).T

    def teacher_logits(self) -> list[Tensor]:
        """Of each teacher with its own scale, (B, B)."""
        pairs = zip(self.teachers, TEACHERS, strict=True)
        return [shape.logit_scale * unit_rows(image) @ unit_rows(text).T for (image, text), shape in pairs]


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """H(P, Q) of distributions P and logits of Q, averaged over rows."""
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def entropy(target: Tensor) -> Tensor:
    return -(target * target.log()).sum(dim=1).mean()


def test_concatenated_teachers_have_the_mean_of_their_logits() -> None:
    features = Features()
    output = features.run(ensemble(weights("concatenate", hrd=1.0, soft=2.0)))
    teacher = torch.stack(features.teacher_logits()).mean(dim=0)
    student = features.student_logits
    directions = [(teacher, student), (teacher.T, student.T)]
    soft = torch.stack([cross_entropy(target.softmax(dim=1), logits) for target, logits in directions]).mean()
    hrd = soft - torch.stack([entropy(target.softmax(dim=1)) for target, _ in directions]).mean()
    torch.testing.assert_close(output.terms["soft"], soft.detach())
    torch.testing.assert_close(output.terms["hrd"], hrd.detach())
    torch.testing.assert_close(features.gradients(output.loss), features.gradients(hrd + 2 * soft))


def test_where_a_teacher_has_no_features_the_others_keep_their_shares_of_the_logits() -> None:
    features = Features()
    for index, (image, text) in enumerate(features.teachers):
        image[index], text[3 + index] = 0, 0
    output = features.run(ensemble(weights("concatenate", soft=1.0)))
    teacher = torch.stack(features.teacher_logits()).mean(dim=0)
    student = features.student_logits
    directions = [(teacher, student), (teacher.T, student.T)]
    soft = torch.stack([cross_entropy(target.softmax(dim=1), logits) for target, logits in directions]).mean()
    torch.testing.assert_close(output.terms["soft"], soft.detach())
    torch.testing.assert_close(features.gradients(output.loss), features.gradients(soft))


def test_the_temperature_of_concatenated_teachers_divides_their_cosines_weighted_by_their_scales() -> None:
    features = Features()
    output = features.run(ensemble(weights("concatenate", soft=1.0, soft_temperature=0.2)))
    teacher = torch.stack(features.teacher_logits()).sum(dim=0) / sum(shape.logit_scale for shape in TEACHERS) / 0.2
    student = features.student_logits
    directions = [(teacher, student), (teacher.T, student.T)]
    soft = torch.stack([cross_entropy(target.softmax(dim=1), logits) for target, logits in directions]).mean()
    torch.testing.assert_close(output.terms["soft"], soft.detach())


def test_averaged_teachers_have_the_mean_of_their_distributions() -> None:
    features = Features()
    output = features.run(ensemble(weights("average", hrd=1.0, soft=2.0)))
    student = features.student_logits
    directions = [
        (torch.stack([teacher.softmax(dim=1) for teacher in features.teacher_logits()]).mean(dim=0), student),
        (torch.stack([teacher.T.softmax(dim=1) for teacher in features.teacher_logits()]).mean(dim=0), student.T),
    ]
    soft = torch.stack([cross_entropy(target, logits) for target, logits in directions]).mean()
    torch.testing.assert_close(output.terms["soft"], soft.detach())
    torch.testing.assert_close(features.gradients(output.loss), features.gradients(3 * soft))


def test_concatenated_features_are_unit_rows_in_shares_of_their_scales() -> None:
    features = Features()
    objective = ensemble(weights("concatenate", fd=1.0))
    (member,) = objective.objectives
    assert isinstance(member, Objective)
    assert member.image_projection is not None
    assert member.text_projection is not None
    sides = []
    for side, raw, projection in ((0, features.image, member.image_projection), (1, features.text, member.text_projection)):
        shares = [(shape.logit_scale / 97.0) ** 0.5 for shape in TEACHERS]
        target = torch.cat([F.normalize(one[side]) * share for one, share in zip(features.teachers, shares, strict=True)], dim=1)
        torch.testing.assert_close(target.norm(dim=1), torch.ones(NUM_PAIRS, dtype=torch.float64))
        sides.append(F.mse_loss(F.normalize(projection(raw)), target))
    torch.testing.assert_close(features.run(objective).terms["fd"], torch.stack(sides).sum().detach())


def test_averaged_terms_are_means_over_teachers_and_the_task_counts_once() -> None:
    features = Features()
    shapes = [TeacherShape(STUDENT_WIDTH, 30.0), TeacherShape(10, 55.0)]
    features = Features(shapes)
    spec = ObjectiveSpec(**{**EVERYTHING, "gd": 0.01, "teacher_combination": "average"})
    objective = ensemble(spec, shapes)
    output = features.run(objective)
    members = [member for member in objective.objectives if isinstance(member, Objective)]
    alone = []
    for index, shape in enumerate(shapes):
        one = Objective(spec, student_width=STUDENT_WIDTH, teacher_width=shape.width, teacher_logit_scale=shape.logit_scale).double()
        one.load_state_dict(members[index].state_dict())
        alone.append(features.run(one, only=index))
    assert set(output.terms) == set(alone[0].terms)
    for name, value in output.terms.items():
        torch.testing.assert_close(value, (alone[0].terms[name] + alone[1].terms[name]) / 2)
        torch.testing.assert_close(output.weighted[name], (alone[0].weighted[name] + alone[1].weighted[name]) / 2)
    torch.testing.assert_close(output.total, (alone[0].total + alone[1].total) / 2)
    torch.testing.assert_close(output.loss, (alone[0].loss + alone[1].loss) / 2)
    expected = [(one + other) / 2 for one, other in zip(*(features.gradients(each.loss) for each in alone), strict=True)]
    torch.testing.assert_close(features.gradients(output.loss), expected)


@pytest.mark.parametrize("combination", TeacherCombination)
def test_every_parameter_learns_and_scales_are_named(combination: TeacherCombination) -> None:
    objective = ensemble(ObjectiveSpec(teacher_combination=combination))
    output = Features().run(objective)
    output.loss.backward()
    assert [name for name, parameter in objective.named_parameters() if parameter.grad is None] == []
    names = {"cross_scale", "image_scale", "text_scale"}
    is_one = combination is TeacherCombination.CONCATENATE
    assert set(objective.scales()) == (names if is_one else {f"{name}_{index}" for name in names for index in range(3)})


@pytest.mark.parametrize("combination", TeacherCombination)
def test_teachers_that_agree_teach_what_one_teaches(combination: TeacherCombination) -> None:
    twins = [TeacherShape(STUDENT_WIDTH, 30.0)] * 2
    features = Features(twins)
    features.teachers[1] = features.teachers[0]
    spec = weights(combination, task=1.0, hrd=1.0, soft=0.5)
    one = build_objective(spec, student_width=STUDENT_WIDTH, teachers=twins[:1])
    assert isinstance(one, Objective)
    expected, output = features.run(one, only=0), features.run(ensemble(spec, twins))
    torch.testing.assert_close(output.total, expected.total)
    torch.testing.assert_close(features.gradients(output.loss), features.gradients(expected.loss))


@pytest.mark.parametrize("combination", TeacherCombination)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zero_vectors_and_low_precision_stay_finite(combination: TeacherCombination, dtype: torch.dtype) -> None:
    features = Features()
    features.teachers = [(image.to(dtype), text.to(dtype)) for image, text in features.teachers]
    features.teachers[1][0][0] = 0.0
    features.teachers[0][1][:] = 0.0
    output = features.run(ensemble(ObjectiveSpec(teacher_combination=combination)))
    assert torch.isfinite(output.total)
    assert all(torch.isfinite(one).all() for one in features.gradients(output.loss))


@pytest.mark.parametrize(
    ("widths", "values", "num_gathers", "num_similarities"),
    [
        ((6, 6, 6), {}, 2 + 3, 1 + 3 * 5),  # the student's features are the same to all; S is one
        ((6, 10), {}, 2 + 2 + 2, 1 + 2 * 5),  # and in the second's width others
        ((10, 10), {}, 1 + 2 * 3, 1 + 2 * 5),
        ((6, 10, 4), {"task": 1.0}, 1, 1),
        ((6, 10, 4), {"hrd": 1.0, "soft": 1.0}, 1 + 3, 1 + 3),
        ((6, 10, 4), {"hrd": 1.0, "soft": 1.0, "soft_temperature": 0.1}, 1 + 3, 1 + 3 * 2),
    ],
)
def test_averaged_teachers_share_the_student(
    widths: tuple[int, ...], values: dict[str, float], num_gathers: int, num_similarities: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[Tensor] = []
    calls: list[Similarity] = []
    original = Similarity.logits
    monkeypatch.setattr(objective_features, "gather_with_grad", lambda x, _: gathered.append(x) or x)
    monkeypatch.setattr(Similarity, "logits", lambda self, block: calls.append(self) or original(self, block))
    shapes = [TeacherShape(width, 20.0 + width) for width in widths]
    spec = weights("average", fd=1e-9, **values) if values else ObjectiveSpec(teacher_combination=TeacherCombination.AVERAGE)
    Features(shapes).run(ensemble(spec, shapes))
    assert len(gathered) == num_gathers
    assert len(calls) == 2 * num_similarities, "one block in two passes"


def test_targets_of_averaged_teachers_take_turns() -> None:
    """However many teachers there are, no more blocks of similarities are alive at once."""
    num_teachers = 8
    num_pairs, max_block_elements = 400, 20_000
    peaks = {}
    for number in (2, num_teachers):
        shapes = [TeacherShape(STUDENT_WIDTH, 20.0)] * number
        objective, features = ensemble(weights("average", task=1.0, hrd=1.0), shapes), Features(shapes, num_pairs)
        for member in objective.objectives:
            assert isinstance(member, Objective)
            member.max_block_elements = max_block_elements
        with PeakBytes() as measured:
            features.run(objective).loss.backward()
        peaks[number] = measured.peak
    more = peaks[num_teachers] - peaks[2]
    of_features = (num_teachers - 2) * num_pairs * (4 * STUDENT_WIDTH + 4) * 8  # side by side, normalised; and the columns' sums
    assert more < of_features + max_block_elements * 8 / 2, "not even half a block"


def test_no_teacher_and_wrong_features() -> None:
    plain = build_objective(weights("average", task=1.0), student_width=STUDENT_WIDTH, teachers=[])
    assert isinstance(plain, Objective)
    objective = ensemble(weights("average", fd=1.0))
    features = Features()
    with pytest.raises(ValueError, match=r"`teacher_image_features` must be of shape \(pairs, 20\), not \(9, 6\)"):
        features.run(objective, only=0)
    with pytest.raises(ValueError, match="`teacher_image_features` is missing"):
        objective(student_image_features=features.image, student_text_features=features.text, student_logit_scale=features.scale)


def variables_of(objective: Objective, student: dict[str, Matrix], log_scale: float) -> oracle.Variables:
    """The oracle's, with what `objective` has learned; what no active term uses is zero."""
    assert objective.teacher_width is not None
    if objective.teacher_width != objective.student_width:
        unused = np.zeros((objective.teacher_width, objective.student_width))
        student = {"image_projection": unused, "text_projection": unused} | student
    learned = {name.removesuffix(".weight").replace(".", "_"): one.detach().numpy() for name, one in objective.named_parameters()}
    scales = {name: float(learned.get(name, 0.0)) for name in ("cross_scale", "image_scale", "text_scale", "fusion_scale")}
    return oracle.Variables(**(student | learned | scales), log_student_logit_scale=log_scale)


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    widths=st.lists(st.integers(2, 5), min_size=2, max_size=4),
    spec=st.fixed_dictionaries(
        {
            **dict.fromkeys((*NONE, "soft", "gd", "afd", "mfd"), st.sampled_from([0.0, 0.5, 3.0])),
            "task": st.just(1.0),
            "soft_temperature": st.none() | st.floats(0.05, 1.0),
            "teacher_combination": st.sampled_from(TeacherCombination),
        }
    ).map(ObjectiveSpec.model_validate),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_several_teachers_equal_numpy(widths: list[int], spec: ObjectiveSpec, seed: int, data: st.DataObject) -> None:
    """The total, and its derivative along a random direction of the student's features by central differences."""
    generator = np.random.default_rng(seed)
    num_pairs, student_width = int(generator.integers(1, 8)), widths[0]
    torch.manual_seed(seed)
    shapes = [TeacherShape(width, float(scale)) for width, scale in zip(widths, generator.uniform(1, 60, len(widths)), strict=True)]
    built = TeacherEnsemble(spec, student_width=student_width, teachers=shapes).double()
    members = [member for member in built.objectives if isinstance(member, Objective)]
    names = ("student_image", "student_text", "student_masked_image")
    student = {name: data.draw(hard_rows(generator.normal(size=(num_pairs, student_width)))) for name in names}
    rows = [[data.draw(hard_rows(generator.normal(size=(num_pairs, width)))) for width in widths] for _ in range(2)]
    teachers = [oracle.Teacher(*both, shape.logit_scale, spec.soft_temperature) for *both, shape in zip(*rows, shapes, strict=True)]
    if spec.teacher_combination is TeacherCombination.CONCATENATE:
        teachers = [oracle.side_by_side(teachers)]

    leaves = {f"{name}_features": torch.from_numpy(one.copy()).requires_grad_() for name, one in student.items()}
    output = built(
        **leaves,
        student_logit_scale=torch.tensor(9.0, dtype=torch.float64),
        teacher_image_features=torch.from_numpy(np.hstack(rows[0])),
        teacher_text_features=torch.from_numpy(np.hstack(rows[1])),
    )
    output.loss.backward()
    here = [variables_of(member, student, math.log(9.0)) for member in members]
    part_weights = {part: value for part, value in (spec.part_weights | {"mfd": spec.mfd}).items() if value}

    def total_at(step: float) -> float:
        moved = {name: one + step * direction[name] for name, one in student.items()}
        return oracle.mean_total([replace(one, **moved) for one in here], teachers, part_weights, here)

    direction = {name: generator.normal(size=one.shape) * one.any(axis=1, keepdims=True) for name, one in student.items()}
    assert output.total.item() == pytest.approx(total_at(0.0), rel=1e-9, abs=1e-10)
    step = 1e-5
    found = {name: leaves[f"{name}_features"].grad for name in names}
    analytic = sum(float((gradient.numpy() * direction[name]).sum()) for name, gradient in found.items() if gradient is not None)
    numeric = (total_at(step) - total_at(-step)) / (2 * step)
    assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-5 * (1 + abs(output.total.item())))
