"""The picture of `moe-offload plan`: tokens per second over the budget, and the walls above them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload.config import GIB
from moe_offload.errors import ConfigError
from moe_offload.planning.roofline import Speed
from moe_offload.whole_file import whole_file

if TYPE_CHECKING:
    from moe_offload.outlook import Planner

POINTS = 60
HEADROOM = 1.4  # above the speed of the largest budget


def draw(planner: Planner, ram_bytes: int, path: Path) -> None:
    """Write a PNG: decode and prompt by budget, each with every wall that applies; ``ram_bytes`` is marked.

    What binds there stands in words above each part.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'moe_offload[bench]'") from error
    least, most = planner.smallest_ram_bytes, max(planner.whole_ram_bytes, ram_bytes)
    budgets = [least + (most - least) * point // POINTS for point in range(POINTS + 1)]
    outlooks = [planner.outlook(budget) for budget in budgets]
    here, gibs = planner.outlook(ram_bytes), [budget / GIB for budget in budgets]
    parts = {
        "decode": ([outlook.decode for outlook in outlooks], here.decode),
        f"prompt of {planner.prompt_tokens} tokens": ([o.prefill for o in outlooks], here.prefill),
    }
    figure = Figure(figsize=(7, 8), layout="constrained")
    figure.suptitle(planner.checkpoint.path.name)
    for axes, (name, (speeds, now)) in zip(figure.subplots(2), parts.items(), strict=True):
        known = [speed for speed in speeds if speed is not None]
        if len(known) == len(gibs):
            _draw_part(axes, gibs, known)
        axes.axvline(ram_bytes / GIB, color="grey", linewidth=1, label="this budget")
        words = f"{now.tokens_per_s:.3g} tok/s\n{now.walls()}" if now else here.reason or "not known"
        axes.set_title(f"{name}: {words}", fontsize=8, wrap=True)
        axes.set(xlabel="--ram, GiB", ylabel="tokens/s (modelled)")
        axes.legend()
    try:
        with whole_file(path) as file:
            figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}; give a file that can be written") from error


def _draw_part(axes: Any, gibs: Sequence[float], speeds: Sequence[Speed]) -> None:
    """Draw a speed and, dashed, what each of its walls would allow alone."""
    axes.plot(gibs, [speed.tokens_per_s for speed in speeds], label="expected", linewidth=2)
    for wall, limits in wall_limits(speeds).items():
        axes.plot(gibs, limits, linestyle="--", label=f"{wall} alone")
    axes.set_ylim(0, HEADROOM * speeds[-1].tokens_per_s)


def wall_limits(speeds: Sequence[Speed]) -> dict[str, list[float]]:
    """Return for each wall that applies anywhere the tokens per second that it alone would allow."""
    names = [wall for wall in speeds[0].walls_s if any(speed.walls_s[wall] for speed in speeds)]
    return {
        wall: [
            speed.num_tokens / seconds if (seconds := speed.walls_s[wall]) else float("inf")
            for speed in speeds
        ]
        for wall in names
    }
