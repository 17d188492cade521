"""The GPUs of this machine as its driver reports them, through NVML: no torch, no CUDA context."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pynvml

from service.store.workers import GpuReading

logger = logging.getLogger(__name__)

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"

AnyReading = TypeVar("AnyReading")


class GpuReader:
    """Reads the GPUs that jobs of this process may use: those of CUDA_VISIBLE_DEVICES where it is set, else all.

    Indices in it are taken in the driver's order (CUDA_DEVICE_ORDER=PCI_BUS_ID), which is CUDA's own on machines of equal GPUs.
    A driver that hangs makes `read` hang: its GPUs are of no use then.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._has_complained = False

    def read(self) -> list[GpuReading]:
        """Empty where there is no driver, or it fails; the first time, that is logged."""
        try:
            if not self._is_open:
                pynvml.nvmlInit()
                self._is_open = True
            return [_reading(index, handle) for index, handle in enumerate(_visible_handles())]
        except pynvml.NVMLError as error:
            if not self._has_complained:
                logger.info("no GPUs are reported: %s", error)
            self._has_complained = True
            self.close()  # a driver that was loaded anew wants to be opened anew
            return []

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            _or_none(pynvml.nvmlShutdown)


def _visible_handles() -> list[Any]:
    visible = os.environ.get(VISIBLE_VARIABLE)
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    handles = (_or_none(partial(_named_handle, name.strip())) for name in visible.split(",") if name.strip())
    return [handle for handle in handles if handle is not None]


def _named_handle(name: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _reading(index: int, handle: Any) -> GpuReading:
    utilization = _or_none(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    memory = _or_none(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    temperature = _or_none(lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)))
    return GpuReading(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        utilization=utilization,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        temperature_celsius=temperature,
    )


def _or_none(read: Callable[[], AnyReading]) -> AnyReading | None:
    """What a GPU does not tell (a part of one has no utilisation of its own) is no reason not to tell the rest."""
    try:
        return read()
    except pynvml.NVMLError:
        return None
