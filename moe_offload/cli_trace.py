"""`moe-offload trace`: answer prompts and keep which experts every token chose."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moe_offload import cli_session
from moe_offload.errors import ConfigError
from moe_offload.terminal import Progress


def run(args: argparse.Namespace) -> int:
    """Write the trace and print one line about it; return 0."""
    prompts = read_prompts(args.prompts)
    cli_session.check_output("-o", args.output, ".npz")
    args.top_p = args.top_k = None
    cli_session.import_libraries()
    sampling = cli_session.make_sampling(args)
    tokenizer = cli_session.load_tokenizer(args)
    from moe_offload.replay import belady_hit_rate
    from moe_offload.runtime import generate
    from moe_offload.runtime.answer_limits import room_for_answer
    from moe_offload.trace import write_trace

    encoded = [generate.encode_prompt(tokenizer, prompt, raw=args.raw) for prompt in prompts]
    args.no_warm_start = True  # a trace is replayed from cold
    with (
        cli_session.loaded_model(args, tokenizer) as loaded,
        loaded.model.offload.trace(router_logits=args.logits, router_inputs=args.inputs) as recorder,
        Progress("tracing", sys.stderr, lambda count: f"{count:.0f} prompts") as progress,
    ):
        room_for_answer(loaded.model.offload, max(map(len, encoded)), args.max_new_tokens)
        for position, input_ids in enumerate(encoded):
            recorder.begin_sequence()
            result = generate.run(
                loaded.model, tokenizer, input_ids, sampling, _discard, max_new_tokens=args.max_new_tokens
            )
            if result.finish_reason == "interrupted":
                raise KeyboardInterrupt
            progress.update(position + 1, len(encoded))
        trace = recorder.trace()
        pools = loaded.model.offload.plan.pools
    write_trace(args.output, trace)
    decoded = int(trace.phase.sum())
    print(
        f"{args.output}: {trace.num_tokens} tokens ({decoded} decoded) of {len(trace.seq_len)} sequences, "
        f"{len(trace.layers)} layers, {trace.top_k} of {trace.num_experts} experts, "
        f"{args.output.stat().st_size} bytes"
    )
    expert_bytes = {int(i): count for i, count in trace.metadata["expert_bytes"].items()}
    with Progress("asking Belady", sys.stderr):
        most = belady_hit_rate(trace, pools, expert_bytes)
    print(
        f"hit rate {trace.metadata['stats']['hit_rate']:.4f} (policy {trace.metadata['policy']}); "
        f"with the same slots and no prefetch at most {most:.4f} (Belady)"
    )
    return 0


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: its lines that are not empty, or the objects of a .jsonl.

    Raises:
        ConfigError: it cannot be read, an object has no prompt, or there is none at all.
    """
    try:
        # splitlines() would cut at characters that JSON leaves as they are inside a string (U+2028).
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        prompts = [_prompt_of(json.loads(line)) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--prompts {path}: {reason}; UTF-8, one prompt per line, is wanted") from error
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompt")
    return prompts


def _prompt_of(item: Any) -> str:
    """Return an object's "prompt" or first "turn", or a plain string."""
    if isinstance(item, dict):
        item = item.get("prompt", item.get("turns"))
    if isinstance(item, list) and item:
        item = item[0]
    if not isinstance(item, str) or not item.strip():
        raise ConfigError('--prompts: a line is no string and no object with "prompt" or "turns"')
    return item


def _discard(piece: str) -> None:
    """The answers are not shown: their routing is what is wanted."""
