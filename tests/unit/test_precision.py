"""CPU autocast: what is computed in bf16, and what stays in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliprd_core.precision import autocast

CPU = torch.device("cpu")


def attend(mask: Tensor | None, *, requires_grad: bool = False) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 5, 16, generator=generator).bfloat16().requires_grad_(requires_grad) for _ in range(3)]
    with autocast(CPU, torch.bfloat16):
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask), inputs


@pytest.mark.parametrize(
    "mask",
    [None, torch.full((5, 5), -torch.inf, dtype=torch.bfloat16).triu(1), torch.ones(5, 5, dtype=torch.bool).tril()],
    ids=["no mask", "bf16", "bool"],
)
def test_attention_under_bf16_autocast_is_that_of_fp32(mask: Tensor | None) -> None:
    output, inputs = attend(mask)
    expected_mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    expected = F.scaled_dot_product_attention(*(one.float() for one in inputs), attn_mask=expected_mask)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


def test_its_gradients_come_back_in_the_inputs_type() -> None:
    output, inputs = attend(None, requires_grad=True)
    torch.autograd.backward(output.sum())
    assert [one.grad.dtype for one in inputs if one.grad is not None] == [torch.bfloat16] * 3


def test_everything_around_attention_is_computed_in_bf16() -> None:
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    inputs = torch.randn(2, 5, 16)
    with autocast(CPU, torch.bfloat16):
        output, _ = layer(inputs, inputs, inputs, need_weights=False)
    assert output.dtype == torch.bfloat16


def test_outside_autocast_attention_keeps_its_type() -> None:
    attend(None)
    inputs = torch.randn(1, 1, 4, 16).bfloat16()
    assert F.scaled_dot_product_attention(inputs, inputs, inputs).dtype == torch.bfloat16
