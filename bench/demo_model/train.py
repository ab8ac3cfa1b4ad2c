"""Train a small Qwen3-MoE language model on a folder of text, in a given number of minutes.

    python bench/demo_model/train.py --text FOLDER --tokenizer OUT/tokenizer.json --out OUT --minutes 80

Every file of the folder is a domain: each training sequence comes from one domain, chosen with
the domain's weight (--weights en_prose=8 c_code=0.5; default 1), and the end of each domain is
kept out of training and measured as validation. The learning rate follows the clock: warm-up,
constant, then linear to zero over the last --decay-fraction of the minutes, so that a run is
finished when its time is up, on any machine. OUT is a Hugging Face folder at every moment.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from corpus import END_OF_TEXT
from train_data import Domain, draw_batch, load_domains, say

VALIDATION_SEQUENCES = 4  # of each domain, the same ones every time


def main() -> None:
    """Train until the minutes are over; print loss and validation loss; leave a checkpoint."""
    args = parse_args()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    domains = load_domains(args)
    model, optimizer, progress = start(args)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{num_parameters / 1e6:.1f} M parameters, from step {progress.step}")
    rng = np.random.default_rng(args.seed + progress.step)
    evaluate(model, domains, args, progress)
    last_save_s = progress.elapsed_s
    while not progress.finished(args):
        loss, tokens_per_s = train_step(model, optimizer, domains, rng, args, progress)
        if progress.step % args.log_every == 0:
            clock = f"step {progress.step} {progress.elapsed_s:.0f} s"
            say(f"{clock} loss {loss:.4f} {tokens_per_s:.0f} tok/s")
        if progress.elapsed_s - last_save_s > args.save_every_s:
            evaluate(model, domains, args, progress)
            save(model, optimizer, progress, args)
            last_save_s = progress.elapsed_s
    evaluate(model, domains, args, progress)
    save(model, optimizer, progress, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of *.txt and *.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: the origin's")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--init-from", type=Path, help="start from this model's weights")
    source.add_argument("--resume", type=Path, help="go on from an --out folder, its clock too")
    run = parser.add_argument_group("run")
    run.add_argument("--minutes", type=float, default=80, help="of training, in all parts together")
    run.add_argument("--steps", type=int, help="stop after so many steps if that comes first")
    run.add_argument("--batch-size", type=int, default=4, help="sequences per step")
    run.add_argument("--seq-len", type=int, default=512)
    run.add_argument("--lr", type=float, default=1e-3)
    run.add_argument("--warmup-steps", type=int, default=50)
    run.add_argument("--decay-fraction", type=float, default=0.5, help="of the time, linear to zero")
    run.add_argument("--weight-decay", type=float, default=0.1)
    run.add_argument("--weights", nargs="*", default=[], metavar="DOMAIN=WEIGHT")
    run.add_argument("--max-mb", type=float, default=8, help="of text per domain, chosen at random")
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--log-every", type=int, default=10)
    run.add_argument("--save-every-s", type=float, default=300)
    shape = parser.add_argument_group("shape of a new model")
    shape.add_argument("--num-hidden-layers", type=int, default=12)
    shape.add_argument("--num-experts", type=int, default=32)
    shape.add_argument("--top-k", type=int, default=4)
    shape.add_argument("--hidden-size", type=int, default=256)
    shape.add_argument("--moe-intermediate-size", type=int, default=128)
    shape.add_argument("--num-attention-heads", type=int, default=8)
    shape.add_argument("--num-key-value-heads", type=int, default=4)
    shape.add_argument("--head-dim", type=int, default=32)
    args = parser.parse_args()
    origin = args.resume or args.init_from
    if args.tokenizer is None and origin is not None:
        args.tokenizer = origin / "tokenizer.json"
    if args.tokenizer is None:
        parser.error("a new model needs --tokenizer tokenizer.json (see train_tokenizer.py)")
    return args


@dataclass
class Progress:
    """Where a run stands; saved with the checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0

    def fraction(self, args: argparse.Namespace) -> float:
        """Part of the run that is behind us, by the clock or by the steps, whichever is further."""
        by_steps = self.step / args.steps if args.steps else 0.0
        return max(self.elapsed_s / (60 * args.minutes), by_steps)

    def finished(self, args: argparse.Namespace) -> bool:
        return self.fraction(args) >= 1

    def lr_scale(self, args: argparse.Namespace) -> float:
        """Warm-up, constant, linear to zero."""
        warmup = (self.step + 1) / args.warmup_steps if args.warmup_steps else 1.0
        return max(0.0, min(1.0, warmup, (1 - self.fraction(args)) / args.decay_fraction))


def start(args: argparse.Namespace) -> tuple[Any, Any, Progress]:
    """Return the model (float32), its optimizer and the progress, new or from a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    origin = args.resume or args.init_from
    options = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    if origin is not None:
        model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32, **options)
    else:
        model = AutoModelForCausalLM.from_config(new_config(args), dtype=torch.float32, **options)
    optimizer = make_optimizer(model, args)
    progress = Progress()
    if args.resume is not None:
        state = torch.load(args.resume / "training_state.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    return model, optimizer, progress


def new_config(args: argparse.Namespace) -> Any:
    from tokenizers import Tokenizer
    from transformers import Qwen3MoeConfig

    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    return Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=args.hidden_size,
        intermediate_size=args.moe_intermediate_size, moe_intermediate_size=args.moe_intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_experts=args.num_experts, num_experts_per_tok=args.top_k,
        num_attention_heads=args.num_attention_heads, num_key_value_heads=args.num_key_value_heads,
        head_dim=args.head_dim, norm_topk_prob=True, decoder_sparse_step=1, tie_word_embeddings=True,
        max_position_embeddings=max(1024, args.seq_len), router_aux_loss_coef=0.01,
        bos_token_id=end_id, eos_token_id=end_id, pad_token_id=end_id,
    )  # fmt: skip


def make_optimizer(model: Any, args: argparse.Namespace) -> Any:
    """AdamW; norms and other vectors are not decayed."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def train_step(
    model: Any, optimizer: Any, domains: list[Domain], rng: np.random.Generator,
    args: argparse.Namespace, progress: Progress,
) -> tuple[float, float]:  # fmt: skip
    """Do one step; return the language-model loss in nats per token and the tokens per second."""
    import torch

    begin = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = args.lr * progress.lr_scale(args)
    input_ids = draw_batch(domains, rng, args)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=input_ids, labels=input_ids, output_router_logits=True, use_cache=False)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    step_s = time.perf_counter() - begin
    progress.step += 1
    progress.elapsed_s += step_s
    balance_loss = model.config.router_aux_loss_coef * float(out.aux_loss.detach())
    return float(out.loss.detach()) - balance_loss, input_ids.numel() / step_s


def evaluate(model: Any, domains: list[Domain], args: argparse.Namespace, progress: Progress) -> None:
    """Print the validation loss of each domain and their weighted mean, nats per token."""
    import torch

    model.eval()
    losses = {}
    for item in domains:
        num = min(VALIDATION_SEQUENCES, len(item.validation) // args.seq_len)
        rows = item.validation[: num * args.seq_len].reshape(num, args.seq_len).astype(np.int64)
        input_ids = torch.from_numpy(rows)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            losses[item.name] = float(model(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
    total = sum(item.weight for item in domains)
    mean = sum(item.weight * losses[item.name] for item in domains) / total
    parts = " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    say(f"step {progress.step} validation {mean:.4f} perplexity {math.exp(mean):.1f} | {parts}")


def save(model: Any, optimizer: Any, progress: Progress, args: argparse.Namespace) -> None:
    """Write the checkpoint beside ``args.out``, then rename: a stop at any moment leaves a whole one."""
    import torch

    unfinished = args.out.with_name(args.out.name + ".partial")
    previous = args.out.with_name(args.out.name + ".previous")
    for leftover in (unfinished, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(unfinished)
    shutil.copy(args.tokenizer, unfinished / "tokenizer.json")
    write_tokenizer_config(unfinished)
    state = {"optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, unfinished / "training_state.pt")
    if args.out.exists():
        os.replace(args.out, previous)
    os.replace(unfinished, args.out)
    shutil.rmtree(previous, ignore_errors=True)


def write_tokenizer_config(folder: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | dict.fromkeys(
        ("bos_token", "eos_token", "pad_token"), END_OF_TEXT
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
