"""Joules of a phase, idle subtracted, where the machine counts them; otherwise why not.

Sources, all without another package: RAPL (Linux powercap: packages and their memory), NVML's counter of
each NVIDIA GPU, and tegrastats on a Jetson. Counters only grow, and wrap around: a reading takes the
difference to the reading before it, so read more often than a counter turns (RAPL: half an hour at 100 W).
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
IDLE_S = 2.0
TEGRASTATS_INTERVAL_MS = 100
# Of a Jetson's rails the one that feeds the others, by module; without one, the sum of all.
TEGRA_INPUTS = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN", "SYS5V", "VIN")
_RAIL = re.compile(r"([A-Z][A-Z0-9_]+) (\d+)(?:mW)?/\d+(?:mW)?")


@dataclass
class Counter:
    """A source that counts joules; ``read`` gives them since some beginning, modulo ``range_joules``."""

    name: str
    read: Callable[[], float]
    range_joules: float = 0.0  # 0: never wraps
    total_joules: float = 0.0
    last: float | None = None

    def advance(self) -> float:
        """Return the joules since the first reading."""
        now = self.read()
        if self.last is not None:
            step = now - self.last
            self.total_joules += step + self.range_joules if step < 0 else step
        self.last = now
        return self.total_joules


@dataclass
class EnergyMeter:
    """All counters of a machine; ``why`` says for each kind why there is none."""

    counters: list[Counter]
    why: dict[str, str] = field(default_factory=dict)
    idle_watts: float = 0.0
    close: Callable[[], None] = lambda: None

    def joules(self) -> float:
        """Return the joules since the first reading, over all counters."""
        return sum(counter.advance() for counter in self.counters)

    def measure_idle(self, seconds: float = IDLE_S, sleep: Callable[[float], None] = time.sleep) -> None:
        """Take what the machine draws while this process sleeps as what it draws anyway."""
        if not self.counters:
            return
        before, started = self.joules(), time.perf_counter()
        sleep(seconds)
        self.idle_watts = (self.joules() - before) / (time.perf_counter() - started)

    def describe(self) -> str:
        """Return the sources, or why there are none, in a line."""
        if self.counters:
            names = ", ".join(counter.name for counter in self.counters)
            return f"energy by {names}; {self.idle_watts:.1f} W idle are subtracted"
        return "no energy: " + "; ".join(f"{kind}: {reason}" for kind, reason in self.why.items())


def open_meter(powercap: Path = POWERCAP) -> EnergyMeter:
    """Return a meter on every source that this machine has."""
    counters: list[Counter] = []
    why: dict[str, str] = {}
    closers: list[Callable[[], None]] = []
    for kind, find in (("RAPL", lambda: rapl_counters(powercap)), ("NVML", nvml_counters)):
        found, reason = find()
        counters += found
        if reason:
            why[kind] = reason
    found, reason, close = tegra_counters()
    counters += found
    closers.append(close)
    if reason:
        why["tegrastats"] = reason
    return EnergyMeter(counters, why, close=lambda: [close() for close in closers] and None)


def rapl_counters(powercap: Path) -> tuple[list[Counter], str]:
    """Return packages and their memory; what is below a package is part of it, but for memory."""
    zones = sorted(powercap.glob("*rapl:*")) if powercap.is_dir() else []
    if not zones:
        return [], f"{powercap} has no rapl zone"
    counters, refused = [], ""
    for zone in zones:
        try:
            name = (zone / "name").read_text().strip()
            if not (name.startswith("package") or name == "dram"):
                continue
            range_joules = int((zone / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter(f"RAPL {zone.name.split(':', 1)[1]} {name}", _file(zone), range_joules)
            counter.advance()
        except (OSError, ValueError) as error:
            refused = refused or f"{zone}: {error}"
            continue
        counters.append(counter)
    return counters, "" if counters else refused or f"{powercap} has no package"


def _file(zone: Path) -> Callable[[], float]:
    return lambda: int((zone / "energy_uj").read_text()) / 1e6


def nvml_counters(library: str = "libnvidia-ml.so.1") -> tuple[list[Counter], str]:
    """Return the energy counters of the GPUs (millijoules since the driver was loaded)."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return [], f"{library} is not installed"
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return [], "the driver does not answer"
    counters = []
    for index in range(count.value):
        device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            continue
        if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)):
            continue
        counters.append(Counter(f"NVML {index}", _gpu(nvml, device)))
    return counters, "" if counters else f"none of {count.value} GPUs counts energy"


def _gpu(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> Callable[[], float]:
    def read() -> float:
        energy = ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)):
            raise OSError("NVML stopped counting energy")
        return energy.value / 1e3

    return read


def tegra_counters(command: str = "tegrastats") -> tuple[list[Counter], str, Callable[[], None]]:
    """Return a counter that adds up what tegrastats prints, and a function that ends it."""
    path = shutil.which(command)
    if path is None:
        return [], f"{command} is not installed", lambda: None
    child = subprocess.Popen(
        [path, "--interval", str(TEGRASTATS_INTERVAL_MS)], stdout=subprocess.PIPE, text=True
    )
    sampler = PowerSampler()

    def follow() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            sampler.sample(tegra_watts(line), time.perf_counter())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()

    def close() -> None:
        child.terminate()
        child.wait()
        thread.join()

    return [Counter("tegrastats", lambda: sampler.joules)], "", close


class PowerSampler:
    """Adds watts up over time: each sample holds from the one before it."""

    def __init__(self) -> None:
        self.joules, self._at_s = 0.0, 0.0

    def sample(self, watts: float | None, at_s: float) -> None:
        """Take note of a power; None keeps the clock and counts nothing."""
        if watts is not None and self._at_s:
            self.joules += watts * (at_s - self._at_s)
        self._at_s = at_s


def tegra_watts(line: str) -> float | None:
    """Return the board's watts from a line of tegrastats; None where it prints no rail."""
    rails = {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line) if name != "RAM"}
    total = next((rails[name] for name in TEGRA_INPUTS if name in rails), None)
    return total if total is not None else (sum(rails.values()) or None)


def measured_energy() -> PhaseEnergy:
    """Return what counts joules here, its idle power measured; the caller closes its meter."""
    meter = open_meter()
    meter.measure_idle()
    return PhaseEnergy(meter)


def per_token_text(figures: Mapping[str, float | None]) -> str:
    """Return joules per token for a table, decode and prefill; a dash where nothing counts them."""
    values = [figures.get(f"{phase}_joules_per_token") for phase in ("decode", "prefill")]
    return " / ".join("-" if value is None else f"{value:.3g} J" for value in values)


@dataclass
class PhaseEnergy:
    """Joules of a prompt and of the tokens after it, marked while generate() runs.

    Call ``begin`` before it, the object itself as a LogitsProcessor in it (each call is a token), and
    ``per_token`` after it.
    """

    meter: EnergyMeter
    marks: list[tuple[float, float]] = field(default_factory=list)  # (seconds, joules)
    num_tokens: int = 0

    def begin(self) -> None:
        self.marks, self.num_tokens = [], 0
        self._mark()

    def __call__(self, input_ids: object, scores: object) -> object:
        self.num_tokens += 1
        if self.num_tokens == 1:
            self._mark()
        return scores

    def _mark(self) -> None:
        self.marks.append((time.perf_counter(), self.meter.joules()))

    def prompt_only(self, prompt_tokens: int) -> dict[str, float | None]:
        """As ``per_token`` where nothing was decoded: no token has to have been asked for."""
        if self.num_tokens == 0:
            self._mark()
        return {**self.per_token(prompt_tokens), "decode_joules_per_token": None}

    def per_token(self, prompt_tokens: int) -> dict[str, float | None]:
        """Return joules per token of prompt and answer, idle subtracted; None where nothing counts."""
        if not self.meter.counters:
            return {"prefill_joules_per_token": None, "decode_joules_per_token": None}
        self._mark()
        counts = (prompt_tokens, self.num_tokens - 1)
        spans = zip(self.marks, self.marks[1:], counts, strict=False)
        joules = [
            (end[1] - start[1] - self.meter.idle_watts * (end[0] - start[0])) / max(1, count)
            for start, end, count in spans
        ]
        return {"prefill_joules_per_token": joules[0], "decode_joules_per_token": joules[1]}
