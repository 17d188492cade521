"""Finds the step at which training left the finite numbers, and what left them first, without waiting for the device at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cliprd_core.failures import DivergedError

LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
TERM_PREFIX = "train/term/"


class DivergenceWatch:
    """Keeps, on the device, the first step with a number that is not finite and which numbers those were.

    One step later the weights, and with them every term, are NaN: what is looked at only when logging would blame them all.

    Args:
        is_scaled: Whether a gradient scaler skips steps whose gradient is not finite. An infinite gradient is normal then, and a step
            that is skipped leaves no trace, so one that is finite again clears what was kept.
    """

    def __init__(self, *, is_scaled: bool) -> None:
        self._is_scaled = is_scaled
        self._names: tuple[str, ...] = ()
        self._first_step: Tensor | None = None  # 0-d, int64; 0: none
        self._broken: Tensor | None = None  # (numbers,), bool: those of the first step

    def observe(self, names: Sequence[str], numbers: Tensor, step: int) -> None:
        """Look at what step `step`, from 1, measured; the host does not wait for it.

        Args:
            names: of the numbers, the same in every step.
            numbers: (numbers,), equal on every rank.
        """
        broken = ~numbers.isfinite()
        if self._is_scaled:
            broken[names.index(GRAD_NORM)].fill_(False)
        if self._first_step is None or self._broken is None:
            self._names = tuple(names)
            self._first_step = numbers.new_zeros((), dtype=torch.int64)
            self._broken = torch.zeros_like(broken)
        is_broken = broken.any()
        is_first = is_broken & (self._first_step == 0)
        self._broken = torch.where(is_first, broken, self._broken)
        self._first_step = self._first_step.masked_fill(is_first, step)
        if self._is_scaled:
            self._first_step = self._first_step.masked_fill(~is_broken, 0)

    def check(self) -> None:
        """Wait for the device, and raise DivergedError if any step, with a gradient scaler the last one, had such a number."""
        if self._first_step is None or self._broken is None:
            return
        step = int(self._first_step)
        if step:
            raise diverged([name for name, is_broken in zip(self._names, self._broken.tolist(), strict=True) if is_broken], step)


def diverged(broken: Sequence[str], step: int) -> DivergedError:
    """The error for numbers of these names, at least one, that were the first not to be finite."""
    terms = _terms(broken)
    weight = f" or `objective.{terms[0]}`" if len(terms) == 1 else ""
    if terms:
        culprit = f"loss {'term' if len(terms) == 1 else 'terms'} {', '.join(f'`{term}`' for term in terms)}"
    elif LOSS in broken:
        culprit = "loss"
    elif GRAD_NORM in broken:
        culprit = "gradient"
    else:
        culprit = broken[0].removeprefix("train/")
    verb = "were no longer finite numbers" if len(terms) > 1 else "was no longer a finite number"
    return DivergedError(
        f"The {culprit} {verb} at step {step}.",
        f"It broke in the {culprit} at step {step}: lower `training.learning_rate`{weight}, raise `training.warmup_steps`, or set"
        " `training.grad_clip_norm`; with `training.precision` fp16, try bf16.",
    )


def _terms(broken: Sequence[str]) -> list[str]:
    """The loss terms among them, but for a sum of which a part is there too (`vrd` of `vrd_kl`)."""
    terms = [name.removeprefix(TERM_PREFIX) for name in broken if name.startswith(TERM_PREFIX)]
    return [term for term in terms if not any(other.startswith(f"{term}_") for other in terms)]
