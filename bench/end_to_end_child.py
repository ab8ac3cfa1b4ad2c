"""One measurement of end_to_end.py in a process of its own; prints JSON lines, each as it is known.

    python bench/end_to_end_child.py '{"program": "ours", "model": "big.gguf", ...}'

Both programs get the same token ids: a prompt, then one id after the other (forced_tokens.py).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from energy import measured_energy
from forced_tokens import counters, differences, generate, read_bytes, say, status_bytes, token_ids
from machine_rates import run_bandwidth

WARM_UP_TOKENS = 512  # of a prompt that brings the experts into memory


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec.get("cgroup_procs"):
        Path(spec["cgroup_procs"]).write_text(str(os.getpid()))  # before anything large is imported
    PROGRAMS[spec["program"]](spec)


# Ours


def load_ours(spec: dict[str, Any]) -> Any:
    import moe_offload

    start = time.perf_counter()
    tokens = spec["prompt_tokens"] + spec["warm_tokens"] + spec["decode_tokens"]
    model = moe_offload.from_pretrained(
        spec["model"], ram=spec["ram"], context=tokens + 8, num_threads=spec["threads"], **spec["options"]
    )
    plan = model.offload.plan
    slots = sum(pool.num_slots for pool in plan.pools)
    experts = sum(pool.num_experts for pool in plan.pools)
    say(load_s=time.perf_counter() - start, plan=plan.describe(), slots=slots, experts=experts)
    say(native_step=native_step(model))
    return model


def native_step(model: Any) -> str:
    """Return "native", or why the decode step is not."""
    from moe_offload.runtime.native_families import native_step_reason

    return native_step_reason(model.config.to_dict()) or "native"


def run_ours(spec: dict[str, Any]) -> None:
    model = load_ours(spec)
    if spec["warm_up"]:  # twice: the first brings the experts into memory
        for first in (2000, 3000):
            warm = token_ids(spec, first, min(spec["prompt_tokens"], WARM_UP_TOKENS))
            generate(model, warm, token_ids(spec, first, 4), 0, 60.0)
    prompt = token_ids(spec, spec["first_id"], spec["prompt_tokens"])
    count = spec["warm_tokens"] + spec["decode_tokens"]
    following = token_ids(spec, spec["first_id"] + len(prompt), count + 1)
    energy = measured_energy()  # decoding includes the warm-up's tokens
    before, io_before, started = counters(model), read_bytes(), time.perf_counter()
    energy.begin()
    marks = generate(model, prompt, following, spec["warm_tokens"], spec["decode_limit_s"], [energy])
    say(energy=energy.meter.describe(), **energy.per_token(len(prompt)))
    energy.meter.close()
    after, io_after = counters(model), read_bytes()
    delta = {name: after[name] - before[name] for name in after}
    say(prefill_s=marks.times[0] - started, token_s=differences(marks.times)[spec["warm_tokens"] :])
    say(decode_counters={name: after[name] - marks.counters[name] for name in after}, choices=marks.choices)
    say(
        digest=marks.digest,
        prefill_stream_bytes=delta["stream_bytes"],
        counted_read_bytes=delta["bytes_read"],
    )
    say(io_read_bytes=io_after - io_before, peak_bytes=status_bytes("VmHWM"))
    say(slots_given_back=delta["slots_given_back"])
    model.offload.close()


def run_routing(spec: dict[str, Any]) -> None:
    """Say how much of the routing repeats itself, and what the next layers' routers would foresee."""
    import numpy as np
    import synthetic_routing
    from trace_statistics import segment_routing

    model = load_ours(spec)
    with model.offload.trace(router_logits=False) as recorder:
        generate(model, token_ids(spec, spec["first_id"], spec["prompt_tokens"]), [1, 2], 0, 600.0)
    trace = recorder.trace().head(spec["prompt_tokens"])
    routing = segment_routing(trace, 16)
    counts = [
        np.bincount(trace.experts[:, i].ravel(), minlength=trace.num_experts)
        for i in range(len(trace.layers))
    ]
    quarter = trace.num_experts // 4
    top = np.sort(np.stack(counts), axis=1)[:, ::-1][:, :quarter].sum() / np.sum(counts)
    say(
        adjacent_reuse=synthetic_routing.adjacent_reuse(trace.experts.astype(np.int64)),
        srp_16=routing.srp if routing else None,
        top_quarter_share=float(top),
    )
    model.offload.close()


def run_flip(spec: dict[str, Any]) -> None:
    """Flip a byte of an expert that the last token uses and of one that none does; say what changes."""
    prompt = token_ids(spec, spec["first_id"], spec["prompt_tokens"])
    model = load_ours(spec)
    with model.offload.trace() as recorder:
        original = generate(model, prompt, [1], 0, 60.0).digest
    experts = recorder.trace().experts
    model.offload.close()
    layer_idx = experts.shape[1] // 2
    idle = sorted(set(range(recorder.trace().num_experts)) - set(experts[:, layer_idx].ravel().tolist()))
    for name, expert_id in (("used", int(experts[-1, layer_idx, 0])), ("idle", idle[0] if idle else None)):
        if expert_id is not None:
            with flipped_byte(spec["model"], recorder.trace().layers[layer_idx], expert_id):
                model = load_ours(spec)
                digest = generate(model, prompt, [1], 0, 60.0).digest
                model.offload.close()
            say(**{f"flipping_{name}_changes_logits": digest != original})


@contextmanager
def flipped_byte(path: str, layer_idx: int, expert_id: int) -> Iterator[None]:
    """Double or halve the scale of the middle block of the expert's first matrix; undo it at the end.

    A changed quant would not do: one weight's part in a unit may vanish when the unit is rounded to 8 bits.
    """
    from gguf import GGMLQuantizationType
    from synthetic_blocks import SCALES

    from moe_offload.storage.checkpoint import open_checkpoint
    from moe_offload.storage.expert_format import BLOCK_SIZES, ExpertKey

    experts = open_checkpoint(path).experts
    span = experts.spans[ExpertKey(layer_idx, expert_id)][0]
    ggml_type = experts.layouts[layer_idx].matrices[0].ggml_type
    block_bytes = BLOCK_SIZES[ggml_type].num_bytes
    scale_offset = SCALES[GGMLQuantizationType(ggml_type)][0][0]
    position = span.offset + span.num_bytes // block_bytes // 2 * block_bytes + scale_offset + 1
    with open(path, "r+b", buffering=0) as file:
        original = os.pread(file.fileno(), 1, position)
        try:
            os.pwrite(file.fileno(), bytes([original[0] ^ 0x04]), position)
            os.fsync(file.fileno())
            yield
        finally:
            os.pwrite(file.fileno(), original, position)
            os.fsync(file.fileno())


# llama.cpp


def run_llama(spec: dict[str, Any]) -> None:
    from peer_llama_cpp import Settings, open_model

    start = time.perf_counter()
    context = spec["prompt_tokens"] + spec["warm_tokens"] + spec["decode_tokens"] + 8
    settings = Settings(**spec["settings"])
    evaluate = open_model(spec["model"], settings, context, spec["threads"])
    say(load_s=time.perf_counter() - start)
    if spec["warm_up"]:
        evaluate(token_ids(spec, 2000, min(128, spec["prompt_tokens"])))
        evaluate([1])
        evaluate([])
    prompt = token_ids(spec, spec["first_id"], spec["prompt_tokens"])
    following = token_ids(spec, spec["first_id"] + len(prompt), spec["warm_tokens"] + spec["decode_tokens"])
    energy = measured_energy()
    io_before = read_bytes()
    energy.begin()
    say(prefill_s=timed(lambda: evaluate(prompt)))
    energy([], None)
    token_s: list[float] = []
    for token_id in following:
        token_s.append(timed(lambda: evaluate([token_id])))  # noqa: B023
        energy([], None)
        measured = token_s[spec["warm_tokens"] :]
        if sum(token_s) > spec["decode_limit_s"] and len(measured) > 2:
            break
    say(energy=energy.meter.describe(), **energy.per_token(len(prompt)))
    energy.meter.close()
    say(token_s=token_s[spec["warm_tokens"] :], peak_bytes=status_bytes("VmHWM"))
    say(io_read_bytes=read_bytes() - io_before)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


PROGRAMS = {
    "ours": run_ours,
    "llama": run_llama,
    "bandwidth": run_bandwidth,
    "routing": run_routing,
    "flip": run_flip,
}

if __name__ == "__main__":
    main()
