"""Fit the horizon policy's coefficients to a model's routing traces.

    python bench/fit_horizon.py --trace FILE... -o model.horizon.npz
    moe-offload generate --model MODEL --policy horizon=model.horizon.npz ...

The file remembers the sequences it was made of; cache_hit_rate.py refuses to count them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.policies.horizon_fit import GAMMA, LAYERS_BEFORE, RIDGE, fit_horizon
from moe_offload.terminal import Progress
from moe_offload.trace import read_trace


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--num-experts", type=int, help="of a layer, for traces that do not say")
    parser.add_argument("--gamma", type=float, default=GAMMA, help="discount per token")
    parser.add_argument("--ridge", type=float, default=RIDGE)
    parser.add_argument("--layers-before", type=int, default=LAYERS_BEFORE)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        traces = [read_trace(path, args.num_experts) for path in args.trace]
        with Progress("fitting", sys.stderr, lambda count: f"{count:.0f} layers") as progress:
            fit = fit_horizon(
                traces,
                gamma=args.gamma,
                ridge=args.ridge,
                layers_before=args.layers_before,
                on_progress=progress.update,
            )
    except (ConfigError, CheckpointError) as error:
        print(f"fit_horizon: error: {error}", file=sys.stderr)
        return 2
    fit.write(args.output)
    print(f"{args.output}: {len(fit.trained_on)} sequences, {args.output.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
