"""Energy that the machine has used, where it says so without privileges.

cuda     NVML's counter of the GPU, in mJ since the driver was loaded
cpu      RAPL's counters of all packages, in uJ, which start again at `max_energy_range_uj`
Jetson   the power of the module's input now, in mW, which the readings are taken to hold between them
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

RAPL, INA3221 = "class/powercap", "bus/i2c/drivers/ina3221"
JETSON_RAILS = ("VDD_IN", "POM_5V_IN")  # all that goes into the module


class EnergyMeter:
    """Joules between two calls; None where nothing can be read. `sys` is where the system shows its devices."""

    def __init__(self, device: str = "cpu", sys: Path = Path("/sys")) -> None:
        self._read = (_nvml(device) if device.startswith("cuda") else _rapl(sys)) or _jetson(sys)

    def joules(self, work: Callable[[], object]) -> float | None:
        """What `work` used; it should run for a second at least, since counters move every few ms."""
        if self._read is None:
            return None
        try:
            before = self._read()
            work()
            return self._read() - before
        except OSError:  # readable for root alone, on most systems
            return None


def _nvml(device: str) -> Callable[[], float] | None:
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        index = torch.device(device).index or 0
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, or a GPU that does not count
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


class _Counter:
    """A counter in uJ that starts again at its range."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "energy_uj"
        self.range = int((folder / "max_energy_range_uj").read_text())
        self.last = int(self.file.read_text())
        self.total = 0

    def read(self) -> int:
        now = int(self.file.read_text())
        self.total += (now - self.last) % (self.range + 1)
        self.last = now
        return self.total


def _rapl(sys: Path) -> Callable[[], float] | None:
    """Packages are intel-rapl:N; their parts, intel-rapl:N:M, are counted in them. AMD's use the same names."""
    try:
        folders = [path for path in sorted((sys / RAPL).glob("intel-rapl:*")) if path.name.count(":") == 1]
        counters = [
            _Counter(folder) for folder in folders if (folder / "name").read_text().startswith("package")
        ]
    except OSError:
        return None
    return (lambda: sum(counter.read() for counter in counters) / 1e6) if counters else None


def _jetson(sys: Path) -> Callable[[], float] | None:
    """The integral of the power of the input rail, by the trapezoidal rule between readings."""
    for label in sorted((sys / INA3221).glob("*/hwmon/hwmon*/in*_label")):
        if label.read_text().strip() in JETSON_RAILS:
            number = label.name.removeprefix("in").removesuffix("_label")
            return _Integral(
                label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
            ).read
    return None


class _Integral:
    """Joules from voltage in mV and current in mA."""

    def __init__(self, volts: Path, amperes: Path) -> None:
        self.files = volts, amperes
        self.at, self.watts, self.total = time.monotonic(), self._watts(), 0.0

    def _watts(self) -> float:
        volts, amperes = (int(path.read_text()) for path in self.files)
        return volts * amperes / 1e6

    def read(self) -> float:
        now, watts = time.monotonic(), self._watts()
        self.total += (now - self.at) * (watts + self.watts) / 2
        self.at, self.watts = now, watts
        return self.total
