"""Record routing traces of the bundled demo model, one file per domain of text.

    python bench/make_demo_traces.py --text FOLDER [--output bench/data/traces]

FOLDER holds DOMAIN.txt or DOMAIN.txt.xz, documents separated by a line <|endoftext|> (as for training the
model: bench/demo_model). The beginnings of random documents are prompts; the model goes on by sampling.
A trace holds expert ids and weights of the decoded tokens, no text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "demo_model"))
from corpus import domain, sample_documents, text_files

DOMAINS = ("en_prose", "py_code", "med_en", "math_en", "tech_en", "c_code", "politics_en", "fr_man")
PROMPT_TOKENS, DOCUMENT_BYTES = 32, 4000
ALL_BYTES = 1 << 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data" / "traces")
    parser.add_argument("--model", help="default: the bundled demo model")
    parser.add_argument("--domains", default=",".join(DOMAINS))
    parser.add_argument("--sequences", type=int, default=4, help="of each domain")
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each sequence")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    import moe_offload
    from moe_offload.trace import make_trace, write_trace

    tokenizer = moe_offload.load_tokenizer(args.model)
    model = moe_offload.from_pretrained(args.model, experts="all", prefetch=False, context=512)
    args.output.mkdir(parents=True, exist_ok=True)
    wanted = args.domains.split(",")
    for path in text_files(args.text):
        if domain(path) not in wanted:
            continue
        texts = [text[:DOCUMENT_BYTES] for text in sample_documents(path, ALL_BYTES, args.seed)]
        texts = [text for text in texts if len(text) > 8 * PROMPT_TOKENS][: args.sequences]
        trace = record(model, tokenizer, texts, args).decode_only()
        assert trace.weights is not None
        small = make_trace(
            trace.experts,
            num_experts=trace.num_experts,
            weights=trace.weights.astype(np.float16),
            layers=trace.layers,
            seq_len=trace.seq_len,
            model=trace.model,
            metadata={
                "expert_bytes": trace.metadata["expert_bytes"],
                "domain": domain(path),
                "seed": args.seed,
                "temperature": args.temperature,
                "prompt_tokens": PROMPT_TOKENS,
            },
        )
        write_trace(args.output / f"{domain(path)}.npz", small)
        print(f"{domain(path)}: {small.num_tokens} tokens of {len(small.seq_len)} sequences", flush=True)


def record(model, tokenizer, texts: list[str], args: argparse.Namespace):
    """Return the trace of the model going on with the beginning of every text."""
    import torch
    from transformers import set_seed

    set_seed(args.seed)
    with model.offload.trace() as recorder, torch.no_grad():
        for text in texts:
            recorder.begin_sequence()
            prompt = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT_TOKENS]
            model.generate(
                prompt,
                max_new_tokens=args.tokens + 1,
                min_new_tokens=args.tokens + 1,
                do_sample=True,
                temperature=args.temperature,
                top_k=0,
            )
        return recorder.trace()


if __name__ == "__main__":
    main()
