"""`moe-offload generate`: load, answer one prompt, say what it took."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

from moe_offload import cli_session
from moe_offload.cli import EXIT_INTERRUPTED
from moe_offload.errors import ConfigError

if TYPE_CHECKING:
    from moe_offload.runtime.generate import GenerationResult

DEMO_PROMPT = "Once upon a time"
MOST_PROMPT_BYTES = 64 << 20  # /dev/zero has no end


def run(args: argparse.Namespace) -> int:
    """Answer the prompt; return 0, or 130 when Ctrl-C cut the answer short."""
    prompt = read_prompt(args)
    cli_session.import_libraries()
    from moe_offload.runtime import generate

    sampling = cli_session.make_sampling(args)
    tokenizer = cli_session.load_tokenizer(args)
    input_ids = generate.encode_prompt(
        tokenizer, prompt, system=args.system, raw=args.raw, thinking=args.thinking
    )
    takers = (_keep, _discard) if args.json else (cli_session.print_piece, cli_session.print_thinking)
    with cli_session.loaded_model(args, tokenizer) as loaded:
        with cli_session.prompt_progress(loaded, *takers) as (on_text, on_thinking):
            result = generate.run(
                loaded.model,
                tokenizer,
                input_ids,
                sampling,
                on_text,
                max_new_tokens=args.max_new_tokens,
                stop=args.stop,
                on_thinking=on_thinking,
                split=not args.raw,
            )
        print(json.dumps(_as_json(loaded, result), ensure_ascii=False) if args.json else "", flush=True)
        cli_session.report(args, result, loaded.model.offload)
    return EXIT_INTERRUPTED if result.finish_reason == "interrupted" else 0


def read_prompt(args: argparse.Namespace) -> str:
    """Return --prompt, the content of --prompt-file, or standard input when it is piped."""
    if args.prompt is not None:
        prompt = args.prompt
    elif args.prompt_file is not None:
        prompt = _read_text(args)
    else:
        prompt = _read_stdin()
        if not prompt and args.model is None:
            prompt = DEMO_PROMPT
    if not prompt:
        raise ConfigError("the prompt is empty; give --prompt, --prompt-file or text on standard input")
    return str(prompt)


def _read_text(args: argparse.Namespace) -> str:
    try:
        with args.prompt_file.open("rb") as file:
            return _text_of(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompt-file {args.prompt_file}: {error}; a UTF-8 text file is wanted"
        ) from error


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return _text_of(sys.stdin.buffer)
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: {error}; UTF-8 text is wanted") from error


def _text_of(file: BinaryIO) -> str:
    """Return a prompt, its line ends as in files that Python opens as text; one without an end has an end."""
    content = file.read(MOST_PROMPT_BYTES + 1)
    if len(content) > MOST_PROMPT_BYTES:
        raise ConfigError(f"the prompt has more than {MOST_PROMPT_BYTES >> 20} MiB, which no context holds")
    text = content.decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _as_json(loaded: cli_session.Loaded, result: GenerationResult) -> dict[str, Any]:
    """Return the one object that --json prints."""
    return {
        "model": str(loaded.path),
        "text": result.text,
        "thinking": result.thinking,
        "commentary": result.commentary,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "seed": result.seed,
        "timings": {
            "load_s": loaded.load_s,
            "prefill_s": result.prefill_s,
            "decode_s": result.decode_s,
            "decode_tokens_per_s": result.decode_tokens_per_s,
        },
        "plan": dataclasses.asdict(loaded.model.offload.plan),
        "stats": result.stats,
    }


def _keep(piece: str) -> None:
    """Print nothing now: the whole text comes in the JSON object."""


def _discard(piece: str) -> None:
    """The thinking comes in the JSON object, too."""
