"""Clocks, power, temperature and throttling of a GPU, read by NVIDIA's management library (`nvidia-ml-py`).

Clocks are read, never set: on a shared machine they belong to somebody else.
"""

import importlib
from typing import Any

COLUMNS = ("sm_mhz", "memory_mhz", "watts", "celsius", "throttled")
# Bits of the library's reasons for lower clocks. An idle GPU and clocks that an application asked for do not count.
_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (software)",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}


class GpuState:
    """Reader of one GPU's state. On a CPU, or without the library, all figures are empty."""

    def __init__(self, device: str, index: int = 0) -> None:
        """device: "cpu" or "cuda". index: number of the GPU, among those that the process sees."""
        self.problem = "" if device == "cuda" else "not a GPU"
        """The reason why there are no figures, or ""."""
        self._library: Any = None
        if self.problem:
            return
        try:
            library = importlib.import_module("pynvml")
            library.nvmlInit()
            self._handle = library.nvmlDeviceGetHandleByUUID(_uuid(index))
            self._library = library
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    def read(self) -> dict[str, Any]:
        """The figures of `COLUMNS` at this moment; None, or "" for `throttled`, where one cannot be read."""
        figures: dict[str, Any] = dict.fromkeys(COLUMNS) | {"throttled": ""}
        if self._library is None:
            return figures
        library, handle = self._library, self._handle
        readings = {
            "sm_mhz": lambda: library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM),
            "memory_mhz": lambda: library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_MEM),
            "watts": lambda: library.nvmlDeviceGetPowerUsage(handle) / 1000,
            "celsius": lambda: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU),
            "throttled": lambda: self._throttled(),
        }
        for name, reading in readings.items():
            try:
                figures[name] = reading()
            except Exception as error:  # a virtual GPU does not tell everything
                if name == "throttled":
                    figures[name] = f"unknown: {type(error).__name__}"
        return figures

    def _throttled(self) -> str:
        """Reasons for lower clocks, joined by commas; "" without one."""
        read = getattr(self._library, "nvmlDeviceGetCurrentClocksEventReasons", None)
        bits = (read or self._library.nvmlDeviceGetCurrentClocksThrottleReasons)(self._handle)
        found = [name for constant, name in _REASONS.items() if bits & getattr(self._library, constant, 0)]
        return ", ".join(found)


def _uuid(index: int) -> str:
    """UUID of torch's GPU number `index`. The library counts the machine's GPUs, torch the visible ones."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"
