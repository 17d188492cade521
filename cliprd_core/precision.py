"""What a spec's `training.precision` means on the device at hand; the only place that knows of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cliprd_core.spec import Precision

_AUTOCAST_TYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def autocast_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type that matrix products are computed in; None: fp32 throughout.

    bf16 is a matter of speed, so a CPU without instructions for it computes in fp32 instead: emulated, each product takes eighty times
    as long.
    """
    if precision is Precision.BF16 and device.type == "cpu" and not cpu_has_bf16():
        return None
    return _AUTOCAST_TYPES.get(precision)


@cache
def cpu_has_bf16() -> bool:
    """Whether torch's CPU library has fast bf16 matrix products here (AVX-512, AMX, or Arm's bf16 extension)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """torch's autocast to `dtype`; None: fp32 throughout. On a CPU attention stays in fp32 (`_attention_in_fp32`)."""
    if device.type == "cpu" and dtype is not None:
        _attention_rules()
    context: AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    return context


@cache
def _attention_rules() -> torch.library.Library:
    """Make CPU autocast compute attention in fp32, in all of this process, and return what keeps that rule in force.

    torch's own rule is the lower precision, whose fused backward pass takes up to ten times as long on sequences of a few tokens, as those
    of captions and small images are, and no less on long ones (docs/training.md).
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's own lack of annotations, here and below
    library.impl("scaled_dot_product_attention", _attention_in_fp32, "AutocastCPU")  # type: ignore[no-untyped-call]
    return library


def _attention_in_fp32(  # noqa: PLR0917  # the operator's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`; what follows casts its fp32 output as autocast says."""
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    inputs = (query.float(), key.float(), value.float())
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*inputs, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
