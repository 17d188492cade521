"""The CLIP-RD objective written a second time, in NumPy and from the equations alone, as an oracle that shares no code with ours.

Everything is float64. Because KL's first argument carries no gradient, `frozen` may hold other values than `moving` for those
arguments: finite differences over `moving` with `frozen` fixed are then the gradient that training is to follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass
class Variables:
    """What is learned. Student features are not normalised; projections are None where the widths are equal."""

    student_image: Matrix
    student_text: Matrix
    log_student_logit_scale: float
    cross_scale: float
    image_scale: float
    text_scale: float
    image_projection: Matrix | None = None
    text_projection: Matrix | None = None
    exponentiated: bool = False
    fusion_scale: float = 0.0
    image_fusion: Matrix | None = None
    text_fusion: Matrix | None = None
    image_fusion_bias: Matrix | None = None
    text_fusion_bias: Matrix | None = None
    student_masked_image: Matrix | None = None

    def factor(self, scale: float) -> float:
        return float(np.exp(scale)) if self.exponentiated else scale


@dataclass
class Teacher:
    """What is frozen. Features need not be normalised, and where `is_made` are not normalised here."""

    image: Matrix
    text: Matrix
    logit_scale: float
    soft_temperature: float | None = None
    is_made: bool = False


def normalize(rows: Matrix) -> Matrix:
    lengths = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def log_softmax(logits: Matrix) -> Matrix:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def ce(logits: Matrix) -> float:
    return float(-np.diag(log_softmax(logits)).mean())


def soft_ce(target: Matrix, logits: Matrix) -> float:
    return float(-(np.exp(log_softmax(target)) * log_softmax(logits)).sum(axis=1).mean())


def contrastive_gradients(image: Matrix, text: Matrix, scale: float) -> tuple[Matrix, Matrix]:
    """Pair by pair: each pulls at its own partner, and is pushed from all by their probabilities, once as anchor, once as candidate."""
    by_image, by_text = np.exp(log_softmax(scale * image @ text.T)), np.exp(log_softmax(scale * text @ image.T))
    image_grad, text_grad = np.zeros_like(image), np.zeros_like(text)
    for i in range(len(image)):
        for j in range(len(text)):
            error = (by_image[i, j] + by_text[j, i]) / 2 - (i == j)
            image_grad[i] += scale * error * text[j]
            text_grad[j] += scale * error * image[i]
    return image_grad, text_grad


def kl(target: Matrix, logits: Matrix) -> float:
    log_p, log_q = log_softmax(target), log_softmax(logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


@dataclass
class _Matrices:
    student: Matrix
    a: Matrix
    c: Matrix
    vertical_image: Matrix
    vertical_text: Matrix


def _matched(v: Variables) -> tuple[Matrix, Matrix]:
    image = v.student_image if v.image_projection is None else v.student_image @ v.image_projection.T
    text = v.student_text if v.text_projection is None else v.student_text @ v.text_projection.T
    return normalize(image), normalize(text)


def _matrices(v: Variables, t_i: Matrix, t_t: Matrix) -> _Matrices:
    own_i, own_t = normalize(v.student_image), normalize(v.student_text)
    s_i, s_t = _matched(v)
    return _Matrices(
        student=np.exp(v.log_student_logit_scale) * own_i @ own_t.T,
        a=v.factor(v.cross_scale) * t_i @ s_t.T,
        c=v.factor(v.cross_scale) * t_t @ s_i.T,
        vertical_image=v.factor(v.image_scale) * t_i @ s_i.T,
        vertical_text=v.factor(v.text_scale) * t_t @ s_t.T,
    )


def terms(moving: Variables, teacher: Teacher, frozen: Variables | None = None) -> dict[str, float]:
    """Every term, unweighted."""
    t_i, t_t = (teacher.image, teacher.text) if teacher.is_made else (normalize(teacher.image), normalize(teacher.text))
    s_i, s_t = _matched(moving)
    m = _matrices(moving, t_i, t_t)
    f = _matrices(frozen or moving, t_i, t_t)
    t = teacher.logit_scale * t_i @ t_t.T
    t_soft = t if teacher.soft_temperature is None else t_i @ t_t.T / teacher.soft_temperature
    cross = moving.factor(moving.cross_scale)
    parts = {
        "task": (ce(m.student) + ce(m.student.T)) / 2,
        "fd": float(((s_i - t_i) ** 2).mean() + ((s_t - t_t) ** 2).mean()),
        "icl": (ce(cross * s_i @ t_t.T) + ce(cross * s_t @ t_i.T)) / 2,
        "hrd": (kl(t, m.student) + kl(t.T, m.student.T)) / 2,
        "vrd_kl": (kl(f.vertical_text, m.vertical_image) + kl(f.vertical_text.T, m.vertical_image.T)) / 2,
        "vrd_ce_image": (ce(m.vertical_image) + ce(m.vertical_image.T)) / 2,
        "vrd_ce_text": (ce(m.vertical_text) + ce(m.vertical_text.T)) / 2,
        "xrd": (kl(f.c, m.a) + kl(f.a, m.c) + kl(f.c.T, m.a.T) + kl(f.a.T, m.c.T)) / 4,
        "soft": (soft_ce(t_soft, m.student) + soft_ce(t_soft.T, m.student.T)) / 2,
    }
    student_grads = contrastive_gradients(s_i, s_t, np.exp(moving.log_student_logit_scale))
    teacher_grads = contrastive_gradients(t_i, t_t, teacher.logit_scale)
    parts["gd"] = sum(float(((one - other) ** 2).mean()) for one, other in zip(student_grads, teacher_grads, strict=True))
    if moving.image_fusion is not None and moving.text_fusion is not None:
        own_i, own_t = normalize(moving.student_image), normalize(moving.student_text)
        f_i = normalize(np.hstack([own_i, t_i]) @ moving.image_fusion.T + moving.image_fusion_bias)
        f_t = normalize(np.hstack([own_t, t_t]) @ moving.text_fusion.T + moving.text_fusion_bias)
        fused = moving.factor(moving.fusion_scale) * f_i @ f_t.T
        parts["afd"] = (ce(fused) + ce(fused.T)) / 2
    if moving.student_masked_image is not None:
        masked = moving.student_masked_image
        s_m = normalize(masked if moving.image_projection is None else masked @ moving.image_projection.T)
        parts["mfd"] = float(sum(((s_m[b] - t_i[b]) ** 2).sum() for b in range(len(s_m))) / t_i.size)
    return parts | {"vrd": parts["vrd_kl"] + parts["vrd_ce_image"] + parts["vrd_ce_text"]}


def total(moving: Variables, teacher: Teacher, weights: dict[str, float], frozen: Variables | None = None) -> float:
    """The weighted sum."""
    values = terms(moving, teacher, frozen)
    return sum(weight * values[name] for name, weight in weights.items())


def side_by_side(teachers: list[Teacher]) -> Teacher:
    """The one teacher of several whose logits are the mean of theirs: each one's unit rows times the root of its share of the scales."""
    scales = np.array([teacher.logit_scale for teacher in teachers])
    roots = np.sqrt(scales / scales.sum())
    image = np.hstack([normalize(teacher.image) * root for teacher, root in zip(teachers, roots, strict=True)])
    text = np.hstack([normalize(teacher.text) * root for teacher, root in zip(teachers, roots, strict=True)])
    for i in range(len(image)):
        for j in range(len(text)):
            logits = [t.logit_scale * normalize(t.image)[i] @ normalize(t.text)[j] for t in teachers]
            assert np.isclose(scales.mean() * image[i] @ text[j], np.mean(logits), atol=1e-9)
    return Teacher(image, text, float(scales.mean()), teachers[0].soft_temperature, is_made=True)


def mean_total(moving: list[Variables], teachers: list[Teacher], weights: dict[str, float], frozen: list[Variables]) -> float:
    """The weighted sum of terms that are means over teachers (`task`, too), each with variables of its own beside the student's."""
    totals = [total(v, teacher, weights, f) for v, teacher, f in zip(moving, teachers, frozen, strict=True)]
    return float(np.mean(totals))
