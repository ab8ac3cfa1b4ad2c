"""Load a model in a fresh process, generate, print the peak: peaks of one process cannot be reset."""

from __future__ import annotations

import json
import re
import sys

import torch

import moe_offload
from moe_offload import BudgetError
from moe_offload.residency.memory import peak_bytes


def main() -> None:
    """Arguments: path, ram, context, prompt tokens, new tokens.

    With "smallest" as ram, 100 MiB are asked for first and then what the refusal names.
    """
    path, ram, context, prompt_tokens, new_tokens = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    try:
        model = moe_offload.from_pretrained(path, ram="100MiB" if ram == "smallest" else ram, context=context)
    except BudgetError as error:
        print(json.dumps({"refused": str(error), "peak_bytes": peak_bytes()}))
        if ram != "smallest":
            return
        named = re.search(r"smallest ram that would do is .*?\((\d+) bytes\)", str(error))
        assert named, error
        # What the attempt left in the heap belongs to the process now.
        model = moe_offload.from_pretrained(path, ram=int(named[1]) + 8 * 2**20, context=context)
    moe_offload.load_tokenizer(path)  # after the model, as in the README: the plan reserved room for it
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, model.config.vocab_size, (1, prompt_tokens), generator=generator)
    out = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    stats, plan = model.offload.stats(), model.offload.plan
    slots = sum(pool.num_slots for pool in plan.pools)
    print(
        json.dumps({**stats.as_dict(), "tokens": out[0].tolist(), "slots": slots, "plan": plan.total_bytes})
    )


if __name__ == "__main__":
    main()
