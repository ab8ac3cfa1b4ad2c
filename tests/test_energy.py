"""Energy in the benchmarks: a fake sysfs tree, wrap-around, Jetson's lines, idle, phases apart."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import energy


def make_zone(root: Path, zone: str, name: str, microjoules: int, most: int = 10_000_000) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_packages_and_memory_count_and_parts_of_a_package_do_not(tmp_path: Path) -> None:
    package = make_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    make_zone(tmp_path, "intel-rapl:0:0", "core", 700_000)
    memory = make_zone(tmp_path, "intel-rapl:0:1", "dram", 50_000)
    make_zone(tmp_path, "intel-rapl:1", "psys", 9_000_000)
    (tmp_path / "intel-rapl").mkdir()
    counters, reason = energy.rapl_counters(tmp_path)
    assert [counter.name for counter in counters] == ["RAPL 0 package-0", "RAPL 0:1 dram"] and not reason
    meter = energy.EnergyMeter(counters)
    assert meter.joules() == 0.0
    (package / "energy_uj").write_text("3500000\n")
    (memory / "energy_uj").write_text("150000\n")
    assert meter.joules() == pytest.approx(2.5 + 0.1)


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    package = make_zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    (counter,), _ = energy.rapl_counters(tmp_path)
    readings = []
    for microjoules in (9_500_000, 500_000, 9_900_000, 100_000):
        (package / "energy_uj").write_text(str(microjoules))
        readings.append(counter.advance())
    assert readings == pytest.approx([0.5, 1.5, 10.9, 11.1])


def test_without_a_source_the_column_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    meter = energy.open_meter(tmp_path / "none")
    meter.counters = []  # a machine with an NVIDIA GPU has one
    assert "no rapl zone" in meter.why["RAPL"] and "tegrastats is not installed" in meter.describe()
    phases = energy.PhaseEnergy(meter)
    phases.begin()
    assert set(phases.per_token(3).values()) == {None}
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (zone / "energy_uj").unlink()
    assert "energy_uj" in energy.rapl_counters(tmp_path)[1]
    assert energy.nvml_counters("libdoes-not-exist.so")[1] == "libdoes-not-exist.so is not installed"
    meter.close()


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        ("RAM 2460/30587MB (lfb 4x4MB) CPU [1%@729] VDD_GPU_SOC 2408mW/2408mW VDD_CPU_CV 802mW/802mW "
         "VIN_SYS_5V0 3231mW/3231mW", 3.231),
        ("RAM 900/3964MB CPU [3%@102] POM_5V_IN 1523/1523 POM_5V_GPU 40/40 POM_5V_CPU 203/203", 1.523),
        ("RAM 1/2MB VDD_GPU_SOC 2000mW/1mW VDD_CPU_CV 500mW/1mW", 2.5),
        ("RAM 1/2MB CPU [1%@729]", None),
    ],
)  # fmt: skip
def test_a_jetsons_lines_are_read(line: str, watts: float | None) -> None:
    assert energy.tegra_watts(line) == (None if watts is None else pytest.approx(watts))


def test_power_is_added_up_over_time() -> None:
    sampler = energy.PowerSampler()
    for watts, at_s in ((5.0, 10.0), (5.0, 10.5), (None, 11.0), (3.0, 11.5)):
        sampler.sample(watts, at_s)
    assert sampler.joules == pytest.approx(5.0 * 0.5 + 3.0 * 0.5)


def test_a_child_that_prints_like_tegrastats_is_followed(tmp_path: Path) -> None:
    child = tmp_path / "tegrastats"
    child.write_text("#!/bin/sh\nwhile :; do echo 'VDD_IN 4000mW/4000mW'; sleep 0.01; done\n")
    child.chmod(0o755)
    (counter,), reason, close = energy.tegra_counters(str(child))
    try:
        while counter.read() <= 0:
            pass
    finally:
        close()
    assert not reason


def test_prompt_and_answer_are_apart_and_idle_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.chain([0.0, 2.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    joules = iter([0.0, 20.0, 100.0, 180.0, 300.0])  # 10 W idle, 20 W in each phase
    meter = energy.EnergyMeter([energy.Counter("fake", lambda: next(joules))])
    meter.measure_idle(sleep=lambda seconds: None)
    assert meter.idle_watts == 10.0
    phases = energy.PhaseEnergy(meter)
    phases.begin()
    for _ in range(4):
        assert phases([], "scores") == "scores"
    assert phases.per_token(8) == {
        "prefill_joules_per_token": pytest.approx((80 - 40) / 8),
        "decode_joules_per_token": pytest.approx((120 - 60) / 3),
    }


def test_a_phase_without_answer_counts_all_for_its_tokens() -> None:
    joules = iter([0.0, 30.0, 30.0])
    phases = energy.PhaseEnergy(energy.EnergyMeter([energy.Counter("fake", lambda: next(joules))]))
    phases.begin()
    figures = phases.prompt_only(10)
    assert figures == {"prefill_joules_per_token": pytest.approx(3.0), "decode_joules_per_token": None}
    assert energy.per_token_text(figures) == "- / 3 J"


def test_every_benchmark_of_speed_says_what_energy_it_took_or_why_not() -> None:
    """Each file that reports tokens per second wires energy.py, or names its reason."""
    bench = Path(energy.__file__).parent
    of_speed = {
        path.name for path in bench.glob("*.py") if re.search(r"tok/s|tokens_per_s", path.read_text())
    }
    assert {"decode_speed.py", "gpu_run.py", "prefetch.py", "perplexity.py"} <= of_speed
    # Their children measure.
    by_others = {"end_to_end_runs.py", "end_to_end_report.py", "gpu.py", "gpu_report.py"}
    by_others |= {name for name in of_speed if name.startswith("plan_accuracy")}  # nobody predicts energy
    silent = {
        name
        for name in of_speed - by_others
        if not re.search(r"energy import|NO_ENERGY|energy_figures", (bench / name).read_text())
    }
    assert not silent
