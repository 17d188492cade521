"""One pure function per equation: the readable, dense reference of every loss term, and the oracle of its tests.

What belongs here is maths on whole batches of features, with no knowledge of ranks, weights, blocks or specs. Training uses
``cliprd_core.objective``, which computes the same numbers in bounded memory; these functions hold (B, B) matrices.

Sources: "CLIP-RD: Relational Distillation for Efficient CLIP Knowledge Distillation" (arXiv 2603.25383) and "CLIP-KD: An Empirical
Study of CLIP Model Distillation" (arXiv 2307.12732); each function names its paper, and the name that the term has there. Each function
returns an unweighted 0-d tensor.

Shapes: B pairs in the batch, D width of the features. Row b of every matrix belongs to pair b, so a similarity matrix has its
matching pairs on the diagonal. Features are L2-normalised rows (see :func:`unit_rows`). Scales are factors, used as they are
given: whoever learns one in log space exponentiates it before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = Tensor | float


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision of normalisation, similarities and softmaxes: float64 if an input is, else float32, whatever the inputs."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def unit_rows(features_BD: Tensor) -> Tensor:
    """L2-normalise each row, in float32 at least.

    A row of zeros has no direction: it stays zero and gets a zero gradient, where dividing by a small epsilon would give a
    gradient of 1/epsilon.

    Args:
        features_BD: (B, D), any floating type.

    Returns:
        (B, D) in :func:`compute_dtype`.
    """
    features_BD = features_BD.to(compute_dtype(features_BD))
    norm_B1: Tensor = torch.linalg.vector_norm(features_BD, dim=-1, keepdim=True)
    return features_BD / norm_B1.masked_fill(norm_B1 == 0, torch.inf)


def cross_entropy(logits_BB: Tensor) -> Tensor:
    """CE(Z): mean cross-entropy of the rows of (B, B) logits against the diagonal."""
    return F.cross_entropy(logits_BB, torch.arange(len(logits_BB), device=logits_BB.device))


def kl_divergence(target_logits_BB: Tensor, logits_BB: Tensor) -> Tensor:
    """KL(P‖Q), each the row-wise softmax of (B, B) logits, averaged over rows. The target P carries no gradient."""
    log_target_BB = target_logits_BB.detach().log_softmax(dim=1)
    return F.kl_div(logits_BB.log_softmax(dim=1), log_target_BB, reduction="batchmean", log_target=True)


def task(student_image_BD: Tensor, student_text_BD: Tensor, *, student_logit_scale: Scale) -> Tensor:
    """The student's own CLIP loss (arXiv 2103.00020): ½[CE(σ_s s_I s_Tᵀ) + CE(σ_s s_T s_Iᵀ)]."""
    logits_BB = student_logit_scale * student_image_BD @ student_text_BD.T
    return (cross_entropy(logits_BB) + cross_entropy(logits_BB.T)) / 2


def fd(student_image_BD: Tensor, student_text_BD: Tensor, teacher_image_BD: Tensor, teacher_text_BD: Tensor) -> Tensor:
    """Feature Distillation, FD (arXiv 2307.12732): mean((s_I − t_I)²) + mean((s_T − t_T)²), means over all B·D elements."""
    return F.mse_loss(student_image_BD, teacher_image_BD) + F.mse_loss(student_text_BD, teacher_text_BD)


def mfd(masked_student_image_BD: Tensor, teacher_image_BD: Tensor) -> Tensor:
    """Masked Feature Distillation, MFD (arXiv 2307.12732): mean((s̃_I − t_I)²), s̃_I the student's features of masked images.

    Images only: CLIP-KD's code has no such term but a mask ratio, with which `fd`, text part included, and every other term sees masked
    images. Masked patches are left out of the student's sequence there; here the masked view is one more, so that students without
    patches can have it.
    """
    return F.mse_loss(masked_student_image_BD, teacher_image_BD)


def icl(student_image_BD: Tensor, student_text_BD: Tensor, teacher_image_BD: Tensor, teacher_text_BD: Tensor, cross_scale: Scale) -> Tensor:
    """Interactive Contrastive Learning, ICL (arXiv 2307.12732): ½[CE(σ_x s_I t_Tᵀ) + CE(σ_x s_T t_Iᵀ)].

    `cross_scale` is σ_x, learned and used as it is, not exponentiated, as the published numbers were made.
    """
    image_to_text = cross_entropy(cross_scale * student_image_BD @ teacher_text_BD.T)
    text_to_image = cross_entropy(cross_scale * student_text_BD @ teacher_image_BD.T)
    return (image_to_text + text_to_image) / 2


def hrd(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    *,
    student_logit_scale: Scale,
    teacher_logit_scale: Scale,
) -> Tensor:
    """Horizontal relational distillation: ½[KL(σ_t t_I t_Tᵀ ‖ σ_s s_I s_Tᵀ) + KL(σ_t t_T t_Iᵀ ‖ σ_s s_T s_Iᵀ)].

    Contrastive Relational Distillation, CRD, in CLIP-KD (arXiv 2307.12732).
    Student and teacher widths may differ, since only (B, B) matrices meet.
    """
    student_BB = student_logit_scale * student_image_BD @ student_text_BD.T
    teacher_BB = teacher_logit_scale * teacher_image_BD @ teacher_text_BD.T
    return (kl_divergence(teacher_BB, student_BB) + kl_divergence(teacher_BB.T, student_BB.T)) / 2


def soft_cross_entropy(target_logits_BB: Tensor, logits_BB: Tensor) -> Tensor:
    """H(P, Q) = −Σ P log Q, each the row-wise softmax of (B, B) logits, averaged over rows. The target P carries no gradient."""
    return F.cross_entropy(logits_BB, target_logits_BB.detach().softmax(dim=1))


def soft(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    *,
    student_logit_scale: Scale,
    teacher_scale: Scale,
) -> Tensor:
    """Soft targets (open_clip's distillation loss, and MobileCLIP's, arXiv 2311.17049): ½[H(T, S) + H(Tᵀ, Sᵀ)].

    S = σ_s s_I s_Tᵀ, T = `teacher_scale` · t_I t_Tᵀ, and H as in :func:`soft_cross_entropy`. `teacher_scale` is σ_t, as in open_clip's
    `DistillClipLoss`, or one over a temperature, as in MobileCLIP's training code, which gives the teachers a fixed scale and averages
    the softmaxes of several. With σ_t its gradient is `hrd`'s; its value is greater by the entropy of the teacher's distributions.
    """
    student_BB = student_logit_scale * student_image_BD @ student_text_BD.T
    teacher_BB = teacher_scale * teacher_image_BD @ teacher_text_BD.T
    return (soft_cross_entropy(teacher_BB, student_BB) + soft_cross_entropy(teacher_BB.T, student_BB.T)) / 2


def contrastive_gradients(image_BD: Tensor, text_BD: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Gradients of B · :func:`task` with respect to normalised image and text features: σ E text and σ Eᵀ image, (B, D) each.

    E = ½[softmax of the rows of Z + softmax of its columns] − 1, with Z = σ image textᵀ. They are differentiable.
    """
    logits_BB = scale * image_BD @ text_BD.T
    error_BB = (logits_BB.softmax(dim=1) + logits_BB.softmax(dim=0)) / 2 - torch.eye(len(logits_BB)).to(logits_BB)
    return scale * error_BB @ text_BD, scale * error_BB.T @ image_BD


def gd(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    *,
    student_logit_scale: Scale,
    teacher_logit_scale: Scale,
) -> Tensor:
    """Gradient Distillation, GD (arXiv 2307.12732): mean((G_I − H_I)²) + mean((G_T − H_T)²), means over all B·D elements.

    G are the student's :func:`contrastive_gradients` at σ_s, H the teacher's at σ_t. As in CLIP-KD's code, gradients of the contrastive
    loss with respect to normalised features are matched by squared error, and the student's are differentiated. It departs in three
    points, so CLIP-KD's weight says nothing about this term's: that code averages the loss over pairs, where ours is its sum; it takes
    the gradients of the loss's two directions apart, four errors in all; and it divides similarities by the scale, where every other
    term, and this one, multiplies. Both models' features must be of one width.
    """
    student = contrastive_gradients(student_image_BD, student_text_BD, student_logit_scale)
    teacher = contrastive_gradients(teacher_image_BD, teacher_text_BD, teacher_logit_scale)
    return F.mse_loss(student[0], teacher[0].detach()) + F.mse_loss(student[1], teacher[1].detach())


def afd(fused_image_BD: Tensor, fused_text_BD: Tensor, *, fusion_scale: Scale) -> Tensor:
    """Augmented Feature Distillation, AFD (arXiv 2307.12732): ½[CE(σ_f f_I f_Tᵀ) + CE(σ_f f_T f_Iᵀ)].

    f = the normalised rows of W [s; t] + b, one learned linear map per modality of the student's own and the teacher's normalised
    features, concatenated in that order, to the student's width. σ_f is learned. So it is in CLIP-KD's code for equal widths.
    """
    return task(fused_image_BD, fused_text_BD, student_logit_scale=fusion_scale)


def vrd_kl(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    *,
    image_scale: Scale,
    text_scale: Scale,
) -> Tensor:
    """Vertical Relational Distillation, VRD (arXiv 2603.25383), agreement part: ½[KL(V_T ‖ V_I) + KL(V_Tᵀ ‖ V_Iᵀ)].

    V_I = σ_I t_I s_Iᵀ follows V_T = σ_T t_T s_Tᵀ, which carries no gradient here. Both scales are used as they are.
    """
    image_BB = image_scale * teacher_image_BD @ student_image_BD.T
    text_BB = text_scale * teacher_text_BD @ student_text_BD.T
    return (kl_divergence(text_BB, image_BB) + kl_divergence(text_BB.T, image_BB.T)) / 2


def vrd_ce_image(student_image_BD: Tensor, teacher_image_BD: Tensor, *, image_scale: Scale) -> Tensor:
    """Vertical relational distillation, image part: ½[CE(V_I) + CE(V_Iᵀ)] with V_I = σ_I t_I s_Iᵀ."""
    image_BB = image_scale * teacher_image_BD @ student_image_BD.T
    return (cross_entropy(image_BB) + cross_entropy(image_BB.T)) / 2


def vrd_ce_text(student_text_BD: Tensor, teacher_text_BD: Tensor, *, text_scale: Scale) -> Tensor:
    """Vertical relational distillation, text part: ½[CE(V_T) + CE(V_Tᵀ)] with V_T = σ_T t_T s_Tᵀ."""
    text_BB = text_scale * teacher_text_BD @ student_text_BD.T
    return (cross_entropy(text_BB) + cross_entropy(text_BB.T)) / 2


def xrd(student_image_BD: Tensor, student_text_BD: Tensor, teacher_image_BD: Tensor, teacher_text_BD: Tensor, cross_scale: Scale) -> Tensor:
    """Cross Relational Distillation, XRD (arXiv 2603.25383): ¼[KL(C ‖ A) + KL(A ‖ C) + KL(Cᵀ ‖ Aᵀ) + KL(Aᵀ ‖ Cᵀ)].

    A = σ_x t_I s_Tᵀ and C = σ_x t_T s_Iᵀ. Each divergence's first argument is detached, so the four give each side its
    gradient. `cross_scale` is used as it is.
    """
    a_BB = cross_scale * teacher_image_BD @ student_text_BD.T
    c_BB = cross_scale * teacher_text_BD @ student_image_BD.T
    rows = kl_divergence(c_BB, a_BB) + kl_divergence(a_BB, c_BB)
    columns = kl_divergence(c_BB.T, a_BB.T) + kl_divergence(a_BB.T, c_BB.T)
    return (rows + columns) / 4
