"""The state of a GPU, read from a stand-in of NVIDIA's library."""

import sys
import types

import pytest
import torch

from mvlm_benchmarks.gpu_state import COLUMNS, GpuState


class Library(types.ModuleType):
    """One GPU at 1,410 MHz, 350.5 W and 61 degrees, held back by its power cap and by heat."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksEventReasonGpuIdle = 1
    nvmlClocksEventReasonSwPowerCap = 4
    nvmlClocksEventReasonSwThermalSlowdown = 32
    bits = 4 | 32

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, which: int) -> int:
        assert handle == "handle"
        return {1: 1410, 2: 2619}[which]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 350_500

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.bits


@pytest.fixture
def library(monkeypatch) -> Library:
    library = Library("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return library


def test_state_of_a_gpu_under_load(library) -> None:
    assert GpuState("cuda").read() == {
        "sm_mhz": 1410, "memory_mhz": 2619, "watts": 350.5, "celsius": 61, "throttled": "power cap, heat (software)",
    }  # fmt: skip


def test_idle_gpu_is_not_throttled(library) -> None:
    library.bits = 1
    assert GpuState("cuda").read()["throttled"] == ""


def test_figure_that_a_virtual_gpu_keeps_to_itself_is_empty(library, monkeypatch) -> None:
    def refuse(*_):
        raise RuntimeError("not supported")

    monkeypatch.setattr(library, "nvmlDeviceGetPowerUsage", refuse)
    monkeypatch.setattr(library, "nvmlDeviceGetCurrentClocksEventReasons", refuse)
    found = GpuState("cuda").read()
    assert (found["watts"], found["sm_mhz"]) == (None, 1410)
    assert found["throttled"] == "unknown: RuntimeError"


def test_without_the_library_every_figure_is_empty_and_the_reason_is_kept(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    state = GpuState("cuda")
    assert "pynvml" in state.problem
    assert state.read() == dict.fromkeys(COLUMNS) | {"throttled": ""}


def test_cpu_has_no_state() -> None:
    state = GpuState("cpu")
    assert state.problem == "not a GPU"
    assert state.read() == dict.fromkeys(COLUMNS) | {"throttled": ""}
