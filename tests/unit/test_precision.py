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


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 4, stride=4, bias=False),
        nn.Conv2d(3, 8, (4, 2), stride=(4, 2)),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(3, 6, 4, stride=4, groups=3),
        nn.Conv2d(3, 8, 2, stride=2, dilation=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=2),
    ],
    ids=["patches", "oblong patches with a bias", "3 x 3", "1 x 1", "groups", "dilated", "padded"],
)
def test_convolutions_under_bf16_autocast_are_those_of_fp32_up_to_rounding(layer: nn.Conv2d) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 13, 16, generator=generator).requires_grad_()

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        layer.zero_grad()
        images.grad = None
        with autocast(CPU, dtype):
            output = layer(images)
        assert output.dtype == (dtype or torch.float32)
        torch.autograd.backward(output.float().square().sum())
        gradients = [one.grad for one in (images, *layer.parameters()) if one.grad is not None]
        return [output.float(), *gradients]

    for found, expected in zip(run(torch.bfloat16), run(None), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.02 * float(expected.detach().abs().max()))
