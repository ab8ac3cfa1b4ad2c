"""The picture of `moe-offload plan`: tokens per second over the budget, and the walls above them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_offload.config import GIB
from moe_offload.errors import ConfigError

if TYPE_CHECKING:
    from moe_offload.outlook import Planner

POINTS = 60


def draw(planner: Planner, ram_bytes: int, path: Path) -> None:
    """Write a PNG: decode speed by budget, the RAM wall, the disk wall, and where ``ram_bytes`` is.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'moe_offload[bench]'") from error
    least, most = planner.smallest_ram_bytes, max(planner.whole_ram_bytes, ram_bytes)
    budgets = [least + (most - least) * point // POINTS for point in range(POINTS + 1)]
    speeds = [outlook.decode for budget in budgets if (outlook := planner.outlook(budget)).decode]
    gibs = [budget / GIB for budget in budgets]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(gibs, [speed.tokens_per_s for speed in speeds], label="expected", linewidth=2)
    for wall in ("RAM", "disk"):
        limits = [1 / seconds if (seconds := speed.walls_s[wall]) else float("inf") for speed in speeds]
        axes.plot(gibs, limits, linestyle="--", label=f"{wall} alone")
    axes.axvline(ram_bytes / GIB, color="grey", linewidth=1, label="this budget")
    axes.set_ylim(0, 1.15 / speeds[0].walls_s["RAM"])
    axes.set(xlabel="--ram, GiB", ylabel="decode, tokens/s (modelled)", title=planner.checkpoint.path.name)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
