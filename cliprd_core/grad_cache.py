"""A step in micro batches that keeps the negatives of the whole batch: GradCache (arXiv 2101.06983).

What belongs here is how a batch is cut, and the order of passes in which one micro batch's activations are alive at a time:

1. the student's features of all micro batches, without gradient;
2. the objective on all features at once, and its gradient with respect to the features, the scales and the projections;
3. each micro batch forward once more, now with gradient, and backward from the features' cached gradient.

Step 3 must compute what step 1 did, so it draws the same random numbers (dropout, patch dropout, stochastic depth). The sum of its
gradients is the whole batch's, by the chain rule, as long as no layer of the student mixes pairs. Batch normalisation does: it
normalises over a micro batch, as it does over a process's share, and updates its running statistics in step 1 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cliprd_core.step_module import StepLosses, StudentWithObjective, without_running_statistics


class FeatureEncoder(nn.Module):
    """`StudentWithObjective.encode` as a module, for the data-parallel wrapper: it holds the objective's parameters too."""

    def __init__(self, module: StudentWithObjective) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """(b, 3, H, W) images and (b, context) tokens on the host to (b, Ds) features of each kind."""
        return self.module.encode(images, tokens)


@dataclass(frozen=True)
class _GeneratorState:
    """State of the random-number generators that the student may draw from: the CPU's (patch dropout) and its device's."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> _GeneratorState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


@dataclass(frozen=True)
class _Forwarded:
    """What the backward pass needs of the forward pass."""

    images: Tensor  # (B, 3, H, W), on the host
    tokens: Tensor  # (B, context), on the host
    generator_states: list[_GeneratorState]  # before each micro batch
    features: tuple[Tensor, ...]  # of each kind (B, Ds), leaves


class GradCache:
    """The passes of a step in micro batches; see the module's text. A `Passes`."""

    def __init__(self, module: StudentWithObjective, encoder: nn.Module, micro_batch_size: int, device: torch.device) -> None:
        """
        Args:
            module: the student and the objective.
            encoder: the `FeatureEncoder` of `module`, in the data-parallel wrapper where there are several processes.
            micro_batch_size: the most pairs that go through the student at once, at least 1.
            device: of `module`.
        """
        assert micro_batch_size >= 1
        self._module = module
        self._encoder = encoder
        self._micro_batch_size = micro_batch_size
        self._device = device
        self._forwarded: _Forwarded | None = None

    @property
    def micro_batch_size(self) -> int:
        return self._micro_batch_size

    def forward(
        self, images: Tensor, tokens: Tensor, teacher_image_features: Tensor | None, teacher_text_features: Tensor | None
    ) -> StepLosses:
        """Passes 1 and 2. Images may be on the host: each micro batch is moved when its turn comes."""
        generator_states: list[_GeneratorState] = []

        def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            generator_states.append(_GeneratorState.of(self._device))
            return self._module.encode(images, tokens)

        with torch.no_grad():
            features = encode_in_micro_batches(encode, images, tokens, self._micro_batch_size, self._device)
        features = tuple(one.requires_grad_() for one in features)
        self._forwarded = _Forwarded(images, tokens, generator_states, features)
        return self._module.losses(features, teacher_image_features, teacher_text_features)

    def backward(self, loss: Tensor) -> None:
        """Pass 3. Gradients are exchanged between processes once, in the last micro batch."""
        forwarded, self._forwarded = self._forwarded, None
        assert forwarded is not None, "backward comes once after each forward"
        outer = self._outer_parameters()
        found = torch.autograd.grad(loss, [*forwarded.features, *outer])
        feature_gradients, outer_gradients = found[: len(forwarded.features)], found[len(forwarded.features) :]
        sizes = micro_batch_sizes(len(forwarded.images), self._micro_batch_size)
        parts = zip(
            micro_batches(forwarded.images, forwarded.tokens, self._micro_batch_size, self._device),
            forwarded.generator_states,
            zip(*(torch.split(gradient, sizes) for gradient in feature_gradients), strict=True),
            strict=True,
        )
        with without_running_statistics(self._module):
            for number, (inputs, generator_state, gradients) in enumerate(parts, start=1):
                is_last = number == len(sizes)
                with nullcontext() if is_last else self._unsynchronised():
                    generator_state.restore(self._device)
                    features = self._encoder(*inputs)
                    if is_last:  # the wrapper waits for every parameter's gradient, so the objective's come here too
                        torch.autograd.backward([*features, *outer], [*gradients, *outer_gradients])
                    else:
                        torch.autograd.backward(features, gradients)

    def _outer_parameters(self) -> list[nn.Parameter]:
        """Those that the objective uses beside the features."""
        candidates = [*self._module.objective.parameters(), self._module.student.logit_scale]
        return [parameter for parameter in candidates if parameter.requires_grad]

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Where gradients add up in this process alone."""
        if isinstance(self._encoder, DistributedDataParallel):
            context: AbstractContextManager[None] = self._encoder.no_sync()
            return context
        return nullcontext()


def micro_batch_sizes(num_pairs: int, micro_batch_size: int) -> list[int]:
    """Of each micro batch, the larger ones first."""
    num_parts = -(-num_pairs // micro_batch_size)
    return [num_pairs // num_parts + (part < num_pairs % num_parts) for part in range(num_parts)]


def micro_batches(images: Tensor, tokens: Tensor, micro_batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut (B, …) images and tokens into as few parts as the size allows, as even as can be.

    Images are moved to `device` part by part; tokens stay on the host, for `encode_text`.
    """
    sizes = micro_batch_sizes(len(images), micro_batch_size)
    for image_part, token_part in zip(torch.split(images, sizes), torch.split(tokens, sizes), strict=True):
        yield image_part.to(device, non_blocking=True), token_part


def encode_in_micro_batches(
    encode: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    images: Tensor,
    tokens: Tensor,
    micro_batch_size: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """`encode`'s features, of each kind (B, D), of (B, …) images and tokens."""
    parts = [encode(*inputs) for inputs in micro_batches(images, tokens, micro_batch_size, device)]
    return tuple(torch.cat(kind) for kind in zip(*parts, strict=True))
