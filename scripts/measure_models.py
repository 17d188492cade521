"""How large open_clip's models are, as torch itself counts it: parameters, and bytes of activations for each image and caption.

Nothing is computed and nothing large is held: a model is built on torch's meta device and run on fake tensors of the CPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cliprd_core.models import build_architecture

BATCH_SIZES = (2, 4)
"""What a pair adds is the difference between the two, divided."""


def build_on_meta(config: dict[str, Any]) -> nn.Module:
    """The architecture of an open_clip config, without memory for its weights."""
    with torch.device("meta"):
        return build_architecture("config", config)


def count_parameters(config: dict[str, Any]) -> dict[str, int]:
    """Parameters of the `image` tower, of the `text` tower, `other` ones (scales, biases, a captioning decoder); and `frozen`: those
    among them that aren't trained even in a student."""
    model = build_on_meta(config)
    named = dict(model.named_parameters())
    tower_of = {name: _tower_of(name, is_flat=isinstance(model, open_clip.CLIP)) for name in named}
    counts = {tower: sum(one.numel() for name, one in named.items() if tower_of[name] == tower) for tower in ("image", "text", "other")}
    frozen = sum(one.numel() for name, one in named.items() if not one.requires_grad or name == "logit_bias")
    return {**counts, "frozen": frozen}


def _tower_of(name: str, *, is_flat: bool) -> str:
    """`is_flat`: the text tower's parts are the model's own."""
    if name.startswith("visual."):
        return "image"
    if name in ("logit_scale", "logit_bias"):
        return "other"
    return "text" if is_flat or name.startswith("text.") else "other"


def measure_activations(
    config: dict[str, Any], dtypes: Sequence[torch.dtype | None], towers: Sequence[str] = ("image", "text")
) -> list[dict[str, dict[str, int]]]:
    """For each type, of each of the towers: bytes that one more image or caption (of full length) takes.

    `saved`: what a forward pass keeps for the backward pass. `working`: the most that is alive at once in a forward pass without gradients.
    A type is autocast's, as it is on a GPU: layer normalisation in fp32; None: all in fp32.
    """
    model = build_on_meta(config)
    size = config["vision_cfg"].get("image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    with FakeTensorMode(allow_non_fake_inputs=True), _norms_in_fp32():
        model.to_empty(device="cpu")
        return [_slopes([_measure(model, dtype, batch_size, (height, width), towers) for batch_size in BATCH_SIZES]) for dtype in dtypes]


def _slopes(measured: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    small, large = measured
    step = BATCH_SIZES[1] - BATCH_SIZES[0]
    return {tower: {kind: (large[tower][kind] - value) // step for kind, value in kinds.items()} for tower, kinds in small.items()}


def _measure(
    model: nn.Module, dtype: torch.dtype | None, batch_size: int, size: tuple[int, int], towers: Sequence[str]
) -> dict[str, dict[str, int]]:
    images = torch.zeros(batch_size, 3, *size)
    tokens = torch.zeros(batch_size, model.context_length, dtype=torch.long)
    runs = {"image": lambda: model.encode_image(images), "text": lambda: model.encode_text(tokens)}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return {tower: {"saved": saved_bytes(model, run), "working": _working_bytes(run)} for tower, run in runs.items() if tower in towers}


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    own = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: Counter[int] = Counter()  # alive, by storage
        self._live_bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self._live_bytes)
        return out

    def counting_saved_tensors(self) -> AbstractContextManager[None]:
        """Counts also what is saved for the backward pass as a copy of an output, of which no operation tells."""

        def keep(tensor: Tensor) -> Tensor:
            self._add(tensor)
            return tensor

        context: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        return context

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        self._live_bytes += 0 if self._tensors[key] else num_bytes
        self._tensors[key] += 1
        weakref.finalize(tensor, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._tensors[key] -= 1
        self._live_bytes -= 0 if self._tensors[key] else num_bytes


def _working_bytes(run: Callable[[], Tensor]) -> int:
    with torch.no_grad(), LiveBytes() as live:
        run()
    return live.peak


@contextmanager
def _norms_in_fp32() -> Iterator[None]:
    """CUDA's autocast normalises layers in fp32; the CPU's does not."""
    plain = F.layer_norm

    def in_fp32(input: Tensor, *args: Any, **options: Any) -> Tensor:
        return plain(input.float(), *args, **options)

    F.layer_norm = in_fp32
    try:
        yield
    finally:
        F.layer_norm = plain
