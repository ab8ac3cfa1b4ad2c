"""What `generate` and `chat` share: libraries, model, progress, and the account at the end."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload.cli import exit_at_once_on_interrupt
from moe_offload.config import DEMO_MODEL, gib
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.placement import cold_cache_warning
from moe_offload.storage.checkpoint import Checkpoint, open_checkpoint
from moe_offload.terminal import Progress, last_line
from moe_offload.whole_file import why_not

if TYPE_CHECKING:
    from moe_offload.runtime.generate import GenerationResult, Sampling

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer."""

    path: Path
    model: Any  # a transformers PreTrainedModel with .offload
    tokenizer: Any
    load_s: float


def import_libraries() -> None:
    """Import torch and transformers, with a sign of life; Ctrl-C ends the process meanwhile."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a checkpoint is a path: nothing is looked up
    with Progress("loading libraries", sys.stderr), exit_at_once_on_interrupt():
        import moe_offload.runtime.generate
        import moe_offload.runtime.model  # noqa: F401


def check_output(flag: str, path: Path | None, suffix: str = "") -> None:
    """Refuse a file that could not be written, before minutes of work and not after.

    Raises:
        ConfigError: its name does not end in ``suffix``, it is a folder, or its folder is not there.
    """
    if path is None:
        return
    if not path.name.endswith(suffix):
        raise ConfigError(f"{flag} {path}: give a name that ends in {suffix}")
    if reason := why_not(path):
        raise ConfigError(f"{flag} {path} {reason}")


def open_with_experts(args: argparse.Namespace, what: str) -> Checkpoint:
    """Open --model for a command that is about experts; --allow-dense gives a dense model none.

    Raises:
        CheckpointError: as open_checkpoint, or it has none.
    """
    checkpoint = open_checkpoint(args.model or DEMO_MODEL, allow_dense=True)
    if not checkpoint.spec.moe_layers:
        raise CheckpointError(
            f"{checkpoint.path}: this {checkpoint.spec.model_type} model has no experts, so there is nothing "
            f"to {what}; generate and chat run it with --allow-dense"
        )
    return checkpoint


def make_sampling(args: argparse.Namespace) -> Sampling:
    """Return the sampling flags, checked; without --seed every run is another one."""
    from moe_offload.runtime.answer_limits import check_limits
    from moe_offload.runtime.generation_result import Sampling

    check_limits(args.max_new_tokens, getattr(args, "stop", ()))
    seed = args.seed if args.seed is not None else secrets.randbits(63)
    return Sampling(args.temperature, args.top_p, args.top_k, seed)


def load_tokenizer(args: argparse.Namespace) -> Any:
    """Return the tokenizer of --model."""
    from moe_offload.storage.tokenizer import load_tokenizer

    with Progress("reading the tokenizer", sys.stderr):
        return load_tokenizer(args.model or DEMO_MODEL)


@contextmanager
def loaded_model(args: argparse.Namespace, tokenizer: Any) -> Iterator[Loaded]:
    """Load --model inside --ram, and close it on the way out."""
    from moe_offload.runtime.model import from_pretrained

    check_output("--timeline", args.timeline)
    started = time.perf_counter()
    path = args.model or DEMO_MODEL
    with Progress("loading", sys.stderr, gib) as progress:
        model = from_pretrained(
            path,
            ram=args.ram,
            experts=args.experts,
            context=args.context,
            policy=args.policy,
            predictor=args.predictor,
            prefetch=args.prefetch,
            warm_start=not args.no_warm_start,
            num_threads=args.threads,
            profile=args.profile,
            allow_dense=args.allow_dense,
            quant=args.quant,
            device=args.device,
            vram=args.vram,
            scheduler=args.scheduler,
            kv=args.kv,
            progress=progress.step("loading"),
            quant_progress=progress.step("quantizing"),
        )
    try:
        plan = model.offload.plan
        warning = cold_cache_warning(plan, model.offload.spec, model.offload.policy)
        if warning:
            print(f"moe-offload: note: {warning}", file=sys.stderr)
        with model.offload.timeline(args.timeline) if args.timeline is not None else nullcontext():
            yield Loaded(path, model, tokenizer, time.perf_counter() - started)
    finally:
        model.offload.close()


@contextmanager
def prompt_progress(loaded: Loaded, on_text: OnText, on_thinking: OnText) -> Iterator[tuple[OnText, OnText]]:
    """Show the prompt's progress in tokens until the first text comes through one of what is yielded."""
    offload = loaded.model.offload
    progress = Progress("prompt", sys.stderr, lambda tokens: f"{tokens:.0f} tok")
    last: list[OnText] = []

    def ending_progress(taker: OnText) -> OnText:
        def take(piece: str) -> None:
            offload.on_prefill = None
            progress.end()
            if last == [on_thinking] and taker is on_text:
                on_thinking("\n\n")
            last[:] = [taker]
            taker(piece)

        return take

    offload.on_prefill = progress.update
    try:
        with progress:
            yield ending_progress(on_text), ending_progress(on_thinking)
    finally:
        offload.on_prefill = None


def print_piece(piece: str) -> None:
    """Write a piece of the answer to stdout at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def print_thinking(piece: str) -> None:
    """Write a piece of the model's thinking to stderr, dimmed on a terminal: stdout has the answer alone."""
    sys.stderr.write(f"\x1b[2m{piece}\x1b[22m" if sys.stderr.isatty() else piece)
    sys.stderr.flush()


def report(args: argparse.Namespace, result: GenerationResult, offload: Any) -> None:
    """Print the counters where --stats asked for them, and the last line."""
    stats = result.stats
    if args.stats:
        now = offload.stats(belady=True)
        words = ("policy", "predictor", "prefetch_state", "profile")
        for name, value in [*now.as_dict().items(), *((word, getattr(now, word)) for word in words)]:
            print(
                f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}",
                file=sys.stderr,
            )
    needs = stats["hits"] + stats["prefetch_hits"] + stats["misses"]
    line = last_line(
        prompt_tokens=result.prompt_tokens - result.cached_tokens,
        prefill_s=result.prefill_s,
        new_tokens=result.new_tokens,
        decode_s=result.decode_s,
        tokens_per_s=result.decode_tokens_per_s,
        hit_rate=stats["hit_rate"] if needs else None,
        bytes_read=stats["bytes_read"],
        peak_bytes=stats["peak_bytes"],
        ram_bytes=stats["ram_bytes"],
    )
    print(line, file=sys.stderr)
