"""What a spec's `training.precision` means on the device at hand; the only place that knows of autocast."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from functools import cache

import torch

from cliprd_core.cpu_autocast import install_rules
from cliprd_core.training_spec import Precision

logger = logging.getLogger(__name__)

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
    """torch's autocast to `dtype`; None: fp32 throughout. On a CPU with the rules of `cpu_autocast.py`."""
    if device.type == "cpu" and dtype is not None:
        install_rules()
    context: AbstractContextManager[None] = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    return context


def use_exact_products() -> None:
    """From now on this process multiplies fp32 matrices in fp32, though an environment variable may have allowed TF32.

    TF32 keeps 11 bits of a number: 0.05 of a logit of 100, which the objective has.
    """
    if torch.get_float32_matmul_precision() != "highest":
        logger.warning(
            "fp32 products are computed in fp32: TF32, as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE allows it, is too coarse for the loss"
        )
        torch.set_float32_matmul_precision("highest")
