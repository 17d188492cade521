"""GPU numbers over a faked driver (the functions of pynvml are its boundary), and really without one."""

from __future__ import annotations

import logging
from ctypes.util import find_library
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from service.store.workers import GpuReading
from worker.gpus import VISIBLE_VARIABLE, GpuReader

GIB = 2**30


class Driver:
    """Two GPUs; the second one tells neither utilisation nor temperature, as a part of a GPU does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.is_broken = False
        faked: dict[str, Any] = {
            "nvmlInit": lambda: self._note("init"),
            "nvmlShutdown": lambda: self._note("shutdown"),
            "nvmlDeviceGetCount": self._count,
            "nvmlDeviceGetHandleByIndex": self._by_index,
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetName": lambda handle: f"NVIDIA H{handle + 1}00",
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=self._first_only(handle, 97)),
            "nvmlDeviceGetTemperature": lambda handle, _sensor: self._first_only(handle, 61),
            "nvmlDeviceGetMemoryInfo": lambda _handle: SimpleNamespace(used=3 * GIB, total=80 * GIB),
        }
        for name, function in faked.items():
            monkeypatch.setattr(pynvml, name, function)
        monkeypatch.delenv(VISIBLE_VARIABLE, raising=False)

    def _note(self, call: str) -> None:
        self.calls.append(call)

    def _count(self) -> int:
        if self.is_broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return 2

    def _by_index(self, index: int) -> int:
        if index > 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def _by_uuid(self, uuid: str) -> int:
        if uuid not in ("GPU-0", "GPU-1"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return int(uuid[-1])

    def _first_only(self, handle: int, value: int) -> int:
        if handle != 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_what_a_gpu_tells_is_read_and_what_it_does_not_tell_is_left_out(driver: Driver) -> None:
    reader = GpuReader()
    for _ in range(2):
        assert reader.read() == [
            GpuReading(0, "GPU-0", "NVIDIA H100", 0.97, 3 * GIB, 80 * GIB, 61.0),
            GpuReading(1, "GPU-1", "NVIDIA H200", None, 3 * GIB, 80 * GIB, None),
        ]
    reader.close()
    assert driver.calls == ["init", "shutdown"]


@pytest.mark.parametrize(
    ("visible", "uuids"), [("1", ["GPU-1"]), ("GPU-1, 0", ["GPU-1", "GPU-0"]), ("", []), ("5,GPU-9,1", ["GPU-1"]), ("-1", [])]
)
def test_only_the_visible_gpus_are_the_workers(driver: Driver, visible: str, uuids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE_VARIABLE, visible)
    assert [gpu.uuid for gpu in GpuReader().read()] == uuids


def test_a_driver_that_fails_is_logged_once_and_opened_anew(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    reader = GpuReader()
    driver.is_broken = True
    with caplog.at_level(logging.INFO):
        assert reader.read() == reader.read() == []
    assert len(caplog.records) == 1
    driver.is_broken = False
    assert len(reader.read()) == 2
    assert driver.calls == ["init", "shutdown", "init", "shutdown", "init"]


@pytest.mark.skipif(find_library("nvidia-ml") is not None, reason="this machine has a driver")
def test_without_a_driver_there_are_no_gpus_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    reader = GpuReader()
    with caplog.at_level(logging.INFO):
        assert reader.read() == reader.read() == []
    reader.close()
    (record,) = caplog.records
    assert record.getMessage() == "no GPUs are reported: NVML Shared Library Not Found"
