"""`training.compile`: the student's two towers through `torch.compile`, for training alone.

Which kernels a tower gets depends on the shapes that it is compiled for, and those of the text tower change from batch to batch
(`text_encoding.py`). So both are compiled before the first step, for shapes that all attempts of a run have in common: the kernels,
and with them a resumed run's bits, don't follow from the step at which an attempt started. Another machine or another compiler may
choose others.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from cliprd_core.models import LoadedModel
from cliprd_core.precision import autocast
from cliprd_core.text_encoding import encode_alike, trimmed_layers

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CACHE_NAME = "compiled"

ALIKE = ((37, 13), (1, 13))
"""Captions, and tokens of each, that a trimmed text tower is compiled for. Its kernels then take any numbers, but for a single caption,
which gets its own. Primes: a number that a width or the number of heads also has would be taken for that."""


def _options(device: torch.device) -> dict[str, Any]:
    """Of the compiler."""
    # Dropout draws what it draws uncompiled, so that a micro batch's two passes still agree (`grad_cache.py`).
    options: dict[str, Any] = {"fallback_random": True}
    if device.type == "cpu":
        options["compile_threads"] = 1  # a handful of kernels are not worth a pool of processes; hundreds on a GPU are
    return options


def compile_towers(
    student: LoadedModel,
    *,
    batch_sizes: Sequence[int],
    in_micro_batches: bool,
    device: torch.device,
    autocast_type: torch.dtype | None,
    cache_dir: Path,
) -> None:
    """Compile the towers of `student` in place; weights, gradients and running statistics stay as they are.

    Takes a minute or more. Kernels are kept in `cache_dir` for later runs.

    Args:
        student: on `device`, in training mode, not yet in the data-parallel wrapper.
        batch_sizes: all numbers of pairs that go through the student at once, in the order of the steps.
        in_micro_batches: whether they also go through it without gradients.

    Raises:
        ValueError: the towers cannot be compiled here; the message says what to do.
    """
    started = time.monotonic()
    os.environ[CACHE_VARIABLE] = str(cache_dir / CACHE_NAME)  # which torch may have set to a folder in /tmp when it was imported
    model, options = student.model, _options(device)
    layers = trimmed_layers(model)
    model.visual.compile(options=options)
    if layers is not None:
        layers.compile(options=options, dynamic=True)
    elif isinstance(text := getattr(model, "text", None), nn.Module):
        text.compile(options=options)
    size = student.preprocess.image_size
    batches = [torch.zeros(count, 3, size, size, device=device) for count in dict.fromkeys(batch_sizes)]
    passes: list[Callable[[], Tensor]] = [partial(model.encode_image, one) for one in batches]
    if layers is not None:
        passes += [partial(encode_alike, model, num_captions, num_tokens, device) for num_captions, num_tokens in ALIKE]
    with _kept(model):
        try:
            for one in passes:
                with autocast(device, autocast_type):
                    if in_micro_batches:
                        with torch.no_grad():
                            one()
                    features = one()
                torch.autograd.backward(features.float().sum())
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"`training.compile` is true, but torch.compile failed here: {reason[:500]}; it needs a C++ compiler (g++) and Python's"
                " headers on the worker, and layers that it knows; install them, or leave `training.compile` out"
            ) from error
    logger.info("compiled the student's towers in %.0f s", time.monotonic() - started)


def uncompiled() -> AbstractContextManager[None]:
    """A context in which compiled towers run as if they weren't: what is evaluated is what is deployed, at batch sizes of its own."""
    context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return context


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """What passes through `model` meanwhile leaves no gradients, and no trace in its running statistics."""
    buffers: list[tuple[Tensor, Tensor]] = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
