"""The options of every command, and what `--help` says of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import moe_offload
from moe_offload.planning.kv_format import KV_FORMATS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="moe-offload",
        description="Run mixture-of-experts models inside a memory budget.",
    )
    parser.add_argument("--version", action="version", version=f"moe-offload {moe_offload.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="answer one prompt", description=_GENERATE)
    _add_model(generate)
    _add_prompt(generate)
    _add_sampling(generate)
    chat = commands.add_parser("chat", help="talk with a model", description=_CHAT)
    _add_model(chat)
    _add_sampling(chat)
    inspect = commands.add_parser("inspect", help="show what a checkpoint holds", description=_INSPECT)
    _add_path(inspect)
    inspect.add_argument("--context", type=int, metavar="TOKENS", help="key/value cache to reckon with")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    trace = commands.add_parser("trace", help="record which experts are chosen", description=_TRACE)
    _add_model(trace)
    _add_trace(trace)
    fit = commands.add_parser("fit-predictor", help="learn to guess a model's experts", description=_FIT)
    _add_model(fit)
    _add_fit(fit)
    plan = commands.add_parser("plan", help="foretell memory and speed from headers", description=_PLAN)
    _add_plan(plan)
    tune = commands.add_parser("tune", help="measure this machine and choose settings", description=_TUNE)
    _add_path(tune)
    _add_tune(tune)
    info = commands.add_parser("info", help="show this machine and what is used of it", description=_INFO)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


_GENERATE = """Answer a prompt and print the answer as it comes. The prompt is --prompt, --prompt-file or
standard input; it goes through the model's chat template unless there is none or --raw is given."""
_CHAT = """Talk with a model in its chat template. /reset forgets the conversation, /exit or Ctrl-D ends,
Ctrl-C stops an answer."""
_INSPECT = """Show family, layers, experts, bytes by format, and what each memory budget would hold. Reads
headers only."""

_TRACE = """Answer prompts and write down, for every token and layer, the experts that the router chose and
their weights. Budget, policy and prefetch change the time and never the trace."""

_FIT = """Run text through the model, fit the predictors that read experts ahead and the policy that evicts
them, and say how good they are on documents that they were not fitted on. The fits are kept beside the
user's cache for this checkpoint and used from then on; they change the time and never a token. See
docs/PREDICTORS.md and docs/POLICIES.md."""

_INFO = """Show the machine, memory, instruction set, how disks are read, packages and what is off and why:
paste it into a bug report."""

_PLAN = """Say for each model whether it fits, the hit rate and tokens per second to expect, which wall binds
and what would change it. Reads headers; the speed is modelled from what this machine, or a profile, gives."""


_TUNE = """Measure memory, disk and kernels for a model, alone and at once; let a cost model rank settings;
verify the best and its neighbours against the plain defaults in real runs. What was faster beyond noise, or
the defaults, is kept for this machine and model and used from then on; it changes the time, never a token."""


def _model_path(text: str) -> Path:
    """Return a path; an empty one is a variable that was not set, and would be the folder one is in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; leave it out for the bundled demo model")
    return Path(text)


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=_model_path,
        default=None,
        metavar="PATH",
        help="Hugging Face folder (safetensors), GGUF file, or the name org/name[:PART] of a model in the "
        "local caches; default: the bundled demo model",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch what is missing of a model that is given by name"
    )
    parser.add_argument("--allow-dense", action="store_true", help="accept a model without experts")


def _add_caps(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--experts", metavar="N|P%|all", help="cap on experts in memory")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="key/value cache; default 4096 or less")


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    group = parser.add_argument_group("memory and speed (none of these changes a token)")
    group.add_argument(
        "--ram", default="auto", metavar="SIZE", help="memory for everything: 2GiB, 500MB, auto"
    )
    _add_caps(group)
    group.add_argument(
        "--policy",
        metavar="NAME",
        help="eviction policy: auto (what was tuned, else horizon with a fit of this checkpoint, if there is "
        "one), horizon, ewma, lru, ...: docs/POLICIES.md",
    )
    group.add_argument(
        "--predictor",
        metavar="NAME",
        help="what guesses the next experts: auto (a fit of this checkpoint, or else cross_layer_gate), ...: "
        "docs/PREDICTORS.md",
    )
    group.add_argument(
        "--prefetch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="read experts before they are needed, or not; default: yes, unless tuned",
    )
    group.add_argument(
        "--profile",
        default="auto",
        metavar="NAME|FILE|none",
        help="this machine's figures and settings; auto: what tune kept, or a first look of a second or two",
    )
    group.add_argument(
        "--no-warm-start", action="store_true", help="forget what earlier runs used, and keep nothing"
    )
    _add_device(group)
    group.add_argument(
        "--threads", type=int, metavar="N", help="default: cores that may be used, unless tuned"
    )
    group.add_argument("--stats", action="store_true", help="print all counters to stderr at the end")
    lossy = parser.add_argument_group("fewer bits (this changes the tokens)")
    lossy.add_argument(
        "--quant",
        type=str.lower,
        choices=("q8_0", "q4_0", "q4_k"),
        help="quantize a safetensors folder once, into a file in the cache, and run that",
    )
    _add_kv(lossy)


def _add_device(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        metavar="NAME",
        help="what computes experts beside the CPU: cuda, or emulated:vram=512MiB,link=12GB/s (without the "
        "hardware); default: nothing",
    )
    group.add_argument("--vram", metavar="SIZE", help="the device's memory to use: 6GiB, auto")
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        help="who computes an expert: hybrid (default, unless tuned), static_split, on_demand, fiddler, "
        "hybrimoe_greedy",
    )
    group.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="write what CPU, device and link did when, in Chrome's trace format; with --device",
    )


def _add_kv(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv",
        type=str.lower,
        choices=KV_FORMATS,
        help="keep keys and values in 8 bits: a quarter of float32's bytes, half of 16 bits'",
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", type=Path, metavar="PATH")
    group.add_argument("--raw", action="store_true", help="continue the prompt as it is: no chat template")
    group.add_argument("--json", action="store_true", help="print one JSON object when done, no stream")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=_model_path,
        action="append",
        dest="models",
        metavar="PATH",
        help="repeatable: which of these should I take? default: the bundled demo model",
    )
    parser.add_argument("--allow-dense", action="store_true", help="accept models without experts")
    parser.add_argument(
        "--profile",
        metavar="NAME|FILE|none",
        help="a machine's figures; default: what this one was tuned to, or else (none) measure it now",
    )
    parser.add_argument(
        "--ram", default="auto", metavar="SIZE", help="memory for everything: 2GiB, 500MB, auto"
    )
    parser.add_argument(
        "--vram",
        metavar="SIZE|auto",
        help="of the profile's GPU for experts; default: the CPU computes alone",
    )
    parser.add_argument("--context", type=int, metavar="TOKENS", help="key/value cache; default 4096 or less")
    _add_kv(parser)
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="routing of the model (moe-offload trace): its hit rate"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the speed by budget; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="half a minute instead of two and a half")
    parser.add_argument("--seconds", type=float, metavar="S", help="end after about S seconds")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PROFILE.toml", help="write the profile there, too"
    )
    parser.add_argument(
        "--ram", default="auto", metavar="SIZE", help="the budget to choose for: 2GiB, 500MB, auto"
    )
    _add_caps(parser)
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="measure it, too, and choose a scheduler: cuda, or emulated:vram=512MiB,link=12GB/s",
    )
    parser.add_argument("--vram", metavar="SIZE", help="the device's memory to use: 6GiB, auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='one prompt per line, or .jsonl of objects with "prompt" or "turns"',
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="TRACE.npz")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they are")
    parser.add_argument("--logits", action="store_true", help="keep every router's output (float16)")
    parser.add_argument("--inputs", action="store_true", help="keep every router's input (float16)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help="plain text, also .xz; documents end at lines <|endoftext|>",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FIT.npz", help="default: the user's cache")
    parser.add_argument("--tokens", type=int, default=30000, metavar="N", help="to fit on; default 30000")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="layers ahead, 1 to 4; default 2")
    parser.add_argument("--no-network", action="store_true", help="closed forms only: no onnx needed")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of documents")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer (default: the model's generation config, else greedy)")
    group.add_argument("--system", metavar="TEXT", help="system message for the chat template")
    group.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        dest="thinking",
        default=None,
        help="let the model think first, or not, where its chat template has the switch; "
        "thinking is printed to stderr",
    )
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default 256, or what the context allows"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable"
    )
