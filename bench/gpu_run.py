"""One model run of gpu.py in a process of its own: cold, warm, another topic, a prompt; JSON lines.

    python bench/gpu_run.py '{"model": "big.gguf", "options": {"device": "cuda", ...}, ...}'

Every configuration gets the same token ids, whatever the model would have chosen (forced_tokens.py).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from energy import PhaseEnergy, measured_energy
from forced_tokens import differences, generate, say, token_ids

LIMIT_S = 30.0  # of one phase


def main() -> None:
    spec = json.loads(sys.argv[1])
    import moe_offload

    started = time.perf_counter()
    prompt_tokens, decode_tokens = spec["prompt_tokens"], spec["decode_tokens"]
    context = max(spec["prefill_tokens"], prompt_tokens + decode_tokens) + 8
    model = moe_offload.from_pretrained(
        spec["model"], context=context, num_threads=spec.get("threads"), warm_start=False, **spec["options"]
    )
    load_s, energy = time.perf_counter() - started, measured_energy()
    far = spec["vocab_size"] // 2
    phases = {"cold": 0, "warm": decode_tokens, "topic_change": far}
    for phase, first in phases.items():
        say(phase=phase, **decode(model, spec, first, energy))
    say(phase="prefill", **prefill(model, spec, energy))
    stats = model.offload.stats().as_dict()
    numbers = {name: value for name, value in stats.items() if isinstance(value, int | float)}
    say(load_s=load_s, energy=energy.meter.describe(), stats=numbers)
    energy.meter.close()
    model.offload.close()


def decode(model: Any, spec: dict[str, Any], first: int, energy: PhaseEnergy) -> dict[str, Any]:
    """Decode forced tokens after a short prompt; the median and the slowest token, joules of a token."""
    prompt = token_ids(spec, first, spec["prompt_tokens"])
    following = token_ids(spec, first + len(prompt), spec["decode_tokens"] + 1)
    energy.begin()
    marks = generate(model, prompt, following, 0, LIMIT_S, [energy])
    joules = energy.per_token(len(prompt))
    token_s = differences(marks.times)
    return {
        "tokens": len(token_s),
        "tokens_per_s": len(token_s) / sum(token_s),
        "median_token_s": statistics.median(token_s),
        "slowest_token_s": max(token_s),
        "choices": marks.choices,
        "digest": marks.digest,
        "decode_joules_per_token": joules["decode_joules_per_token"],
    }


def prefill(model: Any, spec: dict[str, Any], energy: PhaseEnergy) -> dict[str, Any]:
    prompt = token_ids(spec, 7, spec["prefill_tokens"])
    energy.begin()
    started = time.perf_counter()
    marks = generate(model, prompt, [1, 2], 0, LIMIT_S, [energy])
    seconds = marks.times[0] - started
    return {
        "tokens": len(prompt),
        "tokens_per_s": len(prompt) / seconds,
        "digest": marks.digest,
        "prefill_joules_per_token": energy.per_token(len(prompt))["prefill_joules_per_token"],
    }


if __name__ == "__main__":
    main()
