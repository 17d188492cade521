"""Two operators that CPU autocast computes in another way than by torch's own rules, which take several times as long.

Only what runs under CPU autocast sees these rules, but that in all of the process. docs/decisions.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def install_rules() -> torch.library.Library:
    """Put the rules of this module in force, and return what keeps them so."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's own lack of annotations, here and below
    library.impl("scaled_dot_product_attention", _attention_in_fp32, "AutocastCPU")  # type: ignore[no-untyped-call]
    library.impl("conv2d", _convolution, "AutocastCPU")  # type: ignore[no-untyped-call]
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
    """`F.scaled_dot_product_attention`; what follows casts its fp32 output as autocast says.

    The fused backward pass in bf16 takes up to ten times as long on sequences of a few tokens, as those of captions and small images are,
    and no less on long ones.
    """
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    inputs = (query.float(), key.float(), value.float())
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*inputs, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _convolution(  # noqa: PLR0917  # the operator's signature
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` in autocast's type. One that cuts images into patches, a vision transformer's first layer, is a matrix product of them."""
    dtype = torch.get_autocast_dtype("cpu")
    images, weight = images.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    is_plain = not any(padding) and set(dilation) == {1} and groups == 1
    with torch.autocast("cpu", enabled=False):
        if is_plain and images.dim() == 4 and tuple(stride) == weight.shape[2:] and max(stride) > 1:
            return _patch_products(images, weight, bias)
        return F.conv2d(images, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def _patch_products(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, H, W) images and (W, C, P, Q) weights to (B, W, H // P, W // Q); what does not fill a patch is left out, as by convolution."""
    num_images, channels, height, width = images.shape
    patch_height, patch_width = weight.shape[2:]
    rows, columns = height // patch_height, width // patch_width
    whole = images[:, :, : rows * patch_height, : columns * patch_width]
    patches = whole.reshape(num_images, channels, rows, patch_height, columns, patch_width).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)
