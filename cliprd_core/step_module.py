"""What the data-parallel wrapper wraps, student and objective as one module at the precision each needs, and the passes over it.

`WholeBatch` makes a step's passes over all pairs at once; `cliprd_core.grad_cache` makes them in micro batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cliprd_core.distributed import world_size
from cliprd_core.losses import compute_dtype
from cliprd_core.models import ClipModel
from cliprd_core.objective import Objective
from cliprd_core.precision import autocast
from cliprd_core.teacher_ensemble import TeacherEnsemble
from cliprd_core.text_encoding import encode_text

MASK_PATCH_SIZE = 16
"""Pixels; of what `mfd` masks where the student has no patches of its own. CLIP-KD's ViTs have these."""


class StepLosses(TypedDict):
    """The objective's output as plain containers, which the data-parallel wrapper can look into."""

    loss: Tensor
    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]


class StudentWithObjective(nn.Module):
    """All learned parameters in one module, so that one data-parallel wrapper reduces them all.

    The student runs under autocast; the objective always in fp32 (fp64 for a student in fp64), on the student's unnormalised features.
    """

    def __init__(
        self,
        student: ClipModel,
        objective: Objective | TeacherEnsemble,
        autocast_type: torch.dtype | None,
        mask_patch_size: int = MASK_PATCH_SIZE,
        prepare: nn.Module | None = None,
    ) -> None:
        """
        Args:
            mask_patch_size: pixels, height and width, of what `mfd` masks; used with that term alone.
            prepare: makes the student's input, (B, 3, H, W), of the images that `forward` is given. None: they are that.
        """
        super().__init__()
        self.student = student
        self.objective = objective
        self._autocast_type = autocast_type
        self._mask_patch_size = mask_patch_size
        self.prepare = prepare or nn.Identity()

    def forward(
        self, images: Tensor, tokens: Tensor, teacher_image_features: Tensor | None, teacher_text_features: Tensor | None
    ) -> StepLosses:
        """(B, 3, H, W) images, (B, context) tokens on the host, (B, Dt) teachers' features side by side or None; this process's rows."""
        return self.losses(self.encode(images, tokens), teacher_image_features, teacher_text_features)

    def encode(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """The student's features of images, texts and, with `mfd`, masked images: (B, Ds) each, unnormalised, in fp32 at least.

        `images` on the student's device, `tokens` on the host (`encode_text` says why).
        """
        images = self.prepare(images)
        with autocast(images.device, self._autocast_type):
            features = [self.student.encode_image(images), encode_text(self.student, tokens, images.device)]
            if self.objective.weights.mfd:
                masked = mask_patches(images, self.objective.weights.mfd_mask_ratio, self._mask_patch_size)
                with without_running_statistics(self.student):  # they are for whole images
                    features.append(self.student.encode_image(masked))
        dtype = compute_dtype(*features)
        return tuple(one.to(dtype) for one in features)

    def losses(
        self, features: tuple[Tensor, ...], teacher_image_features: Tensor | None, teacher_text_features: Tensor | None
    ) -> StepLosses:
        """The objective on what `encode` gave. A collective: every process must call it, with equally many pairs."""
        image_features, text_features, *masked_image_features = features
        output = self.objective(
            student_image_features=image_features,
            student_text_features=text_features,
            student_logit_scale=self.student.logit_scale.exp().reshape(()),
            teacher_image_features=teacher_image_features,
            teacher_text_features=teacher_text_features,
            student_masked_image_features=masked_image_features[0] if masked_image_features else None,
            row_counts=[len(image_features)] * world_size(),
        )
        return StepLosses(loss=output.loss, total=output.total, terms=output.terms, weighted=output.weighted)


class Passes(Protocol):
    """The forward and the backward pass of one step, from this process's share of the batch."""

    @property
    def micro_batch_size(self) -> int | None:
        """At most so many pairs go through a model at once, and `forward` takes images from the host. None: all, from the device."""

    def forward(
        self, images: Tensor, tokens: Tensor, teacher_image_features: Tensor | None, teacher_text_features: Tensor | None
    ) -> StepLosses:
        """The losses of (B, 3, H, W) images and (B, context) tokens, these on the host, with (B, Dt) teacher features on the device."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, the last `forward`'s times any factor, to each parameter's, averaged over processes."""


class WholeBatch:
    """Both passes over all pairs at once."""

    micro_batch_size = None

    def __init__(self, module: nn.Module) -> None:
        """`module`: a `StudentWithObjective`, in the data-parallel wrapper where there are several processes."""
        self._module = module

    def forward(
        self, images: Tensor, tokens: Tensor, teacher_image_features: Tensor | None, teacher_text_features: Tensor | None
    ) -> StepLosses:
        losses: StepLosses = self._module(images, tokens, teacher_image_features, teacher_text_features)
        return losses

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)


def mask_patches(images: Tensor, mask_ratio: float, patch_size: int) -> Tensor:
    """(B, 3, H, W) normalised images with `mask_ratio` of each one's square patches, drawn at random, in the mean colour.

    At least one patch stays. Draws from the generator of the images' device.
    """
    num_images, _, height, width = images.shape
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    num_masked = min(round(mask_ratio * rows * columns), rows * columns - 1)
    masked = torch.rand(num_images, rows * columns, device=images.device).topk(num_masked, dim=1).indices
    kept = images.new_ones(num_images, rows * columns).scatter_(1, masked, 0.0).view(num_images, 1, rows, columns)
    kept = kept.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)
    return images * kept[:, :, :height, :width]


@contextmanager
def without_running_statistics(module: nn.Module) -> Iterator[None]:
    """In training mode, batch normalisation as ever, but its running statistics stay as they are."""
    tracking = [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True
