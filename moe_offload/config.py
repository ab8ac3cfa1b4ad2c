"""What the checkpoint is and what the user chose, frozen and validated; units and how they are written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from moe_offload.errors import ConfigError

DEMO_MODEL = Path(__file__).parent / "demo" / "tiny-moe.gguf"  # what runs where no model is named

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

PREFILL_CHUNK_TOKENS = 512  # of transformers' layers, whatever the budget: it decides rounding
DECODE_STEP_MAX_TOKENS = 16  # steps of more tokens stream past the decode cache
DEFAULT_CONTEXT_TOKENS = 4096

# Binary for KiB and for the bare letter (as llama.cpp and docker read "2G"), decimal for KB, MB, GB.
_UNIT_BYTES = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNIT_BYTES |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}


def gib(num_bytes: float) -> str:
    """Return ``num_bytes`` as "3.96 GiB"; sizes below a GiB in smaller units."""
    for unit_bytes, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def parse_bytes(text: str | int) -> int:
    """Return the bytes that ``text`` names: "2GiB", "1.5G" (binary), "500MB" (decimal) or a number.

    Raises:
        ConfigError: nothing of the kind, or less than one byte.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]{0,3})\s*", str(text))
    unit_bytes = _UNIT_BYTES.get(match[2].upper()) if match and not isinstance(text, bool) else None
    num_bytes = math.floor(Fraction(match[1]) * unit_bytes) if match and unit_bytes else 0
    if num_bytes < 1:
        raise ConfigError(
            f"{text!r} is not an amount of memory; accepted are 2GiB or 2G (binary), 2GB (decimal), "
            "512MiB, 1.5GiB, or a positive number of bytes"
        )
    return num_bytes


DEVICE_FORM = "emulated:vram=512MiB,link=12GB/s[,to_host=12GB/s][,latency=10us][,pinned=1GiB][,dense=on]"
LEAST_LINK_BYTES_PER_S = 100_000
DENSE_CHOICES = ("auto", "on", "off")


def parse_device(text: str | None, vram: str | int | None) -> DeviceChoice | None:
    """Return the accelerator that ``device=`` and ``vram=`` name; None for the CPU alone.

    Raises:
        ConfigError: nothing of the kind, or memory named for no accelerator.
    """
    kind, _, settings = str(text).strip().partition(":")
    if text is None or kind in ("cpu", "auto", "-1"):
        if vram is not None:
            raise ConfigError(f'vram={vram!r} is for an accelerator: name it, device="{DEVICE_FORM}"')
        return None
    vram_bytes = None if vram in (None, "auto") else parse_bytes(str(vram))
    if kind == "emulated":
        return _emulated(settings, vram_bytes)
    cuda = re.fullmatch(r"([0-9]{0,3})(?:,?dense=(auto|on|off))?", settings)
    if kind == "cuda" and cuda:
        return DeviceChoice(f"cuda:{cuda[1]}" if cuda[1] else "cuda", vram_bytes, dense=cuda[2] or "auto")
    raise ConfigError(f'device={text!r} is unknown; known are "cpu", "cuda", "cuda:1" and "{DEVICE_FORM}"')


def _emulated(settings: str, vram_bytes: int | None) -> DeviceChoice:
    """Read what follows ``emulated:``."""
    given = dict(part.strip().partition("=")[::2] for part in settings.split(",") if part.strip())
    unknown = sorted(given.keys() - {"vram", "link", "to_host", "latency", "pinned", "dense"})
    if unknown or "" in given.values() or given.get("dense", "on") not in DENSE_CHOICES:
        raise ConfigError(f'device="emulated:{settings}" is not understood; the form is "{DEVICE_FORM}"')
    own_bytes = parse_bytes(given["vram"]) if "vram" in given else None
    if own_bytes is None and vram_bytes is None:
        raise ConfigError(f'an emulated device has the memory that it is given: "{DEVICE_FORM}", or vram=')
    vram_bytes = min(filter(None, (own_bytes, vram_bytes)))
    choice = DeviceChoice("emulated", vram_bytes, dense=given.get("dense", "auto"))
    if "link" in given:
        choice = replace(choice, link_bytes_per_s=_bytes_per_s(given["link"]))
    if "to_host" in given:
        choice = replace(choice, to_host_bytes_per_s=_bytes_per_s(given["to_host"]))
    if "latency" in given:
        choice = replace(choice, latency_s=_seconds(given["latency"]))
    return replace(choice, pinnable_bytes=parse_bytes(given["pinned"])) if "pinned" in given else choice


def _bytes_per_s(text: str) -> float:
    rate = parse_bytes(text.removesuffix("/s"))
    if rate < LEAST_LINK_BYTES_PER_S:
        raise ConfigError(f"a link of {text!r} would take minutes for one expert; 12GB/s is a usual one")
    return float(rate)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*(us|ms|s)\s*", text)
    if match is None:
        raise ConfigError(f"latency={text!r} is no time; accepted are 10us, 0.5ms or 1s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def resolve_expert_cap(experts: str | int | None, total_experts: int) -> int | None:
    """Return how many of the model's ``total_experts`` may be in memory; None when bytes alone decide.

    Args:
        experts: "25%" (rounded down, at least one), a count, "all", or None. A count above the
            model's own is all of them.

    Raises:
        ConfigError: zero, negative, above 100%, or nothing of the kind.
    """
    if experts is None:
        return None
    text = str(experts).strip()
    percent = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%", text)
    if text.lower() == "all":
        return total_experts
    if percent and 0 < float(percent[1]) <= 100:
        return max(1, math.floor(total_experts * Fraction(percent[1]) / 100))
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) > 0:
        return min(int(text), total_experts)
    raise ConfigError(
        f"experts={experts!r} is not a share of the model's {total_experts} experts; accepted are "
        'a percentage above 0% and up to 100% ("25%"), a positive count (96), or "all"'
    )


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a checkpoint in Hugging Face's terms; aliases are resolved when it is made."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    num_experts: int  # 0 for a dense model
    top_k: int
    moe_intermediate_size: int
    moe_layers: tuple[int, ...]  # indices of the decoder layers that have experts
    kv_elements_per_token: tuple[int, ...]  # by layer: cached key and value elements of one token
    # by layer: elements of recurrent or convolution state, of one sequence however long
    state_elements_per_sequence: tuple[int, ...] = ()


@dataclass(frozen=True)
class DeviceChoice:
    """An accelerator by name, as ``parse_device`` read it.

    Attributes:
        kind: "emulated", or a real one's name ("cuda", "cuda:0").
        vram_bytes: None: what is free there, less a reserve.
        link_bytes_per_s, latency_s, pinnable_bytes: of an emulated one.
        to_host_bytes_per_s: of its way back; None: as the way there.
        dense: whether dense layers, keys and values go there, too: "auto" where that is expected to pay.
    """

    kind: str
    vram_bytes: int | None = None
    link_bytes_per_s: float = 12e9
    latency_s: float = 10e-6
    pinnable_bytes: int | None = None  # None: all
    to_host_bytes_per_s: float | None = None
    dense: str = "auto"

    @property
    def key(self) -> str:
        """What profiles are told apart by: the device, and of an emulated one its link; not its memory."""
        if self.kind != "emulated":
            return self.kind.replace(":", "-")
        to_host = self.link_bytes_per_s if self.to_host_bytes_per_s is None else self.to_host_bytes_per_s
        speeds = f"{self.link_bytes_per_s / 1e6:g}-{to_host / 1e6:g}MBs"
        return f"emulated-{speeds}-{self.latency_s * 1e6:g}us"


# A step's misses and as many predicted experts. tune searches others; below 1 a step's misses had no place.
STAGING_PER_TOP_K, MAX_STAGING = 2.0, 16.0
MAX_THREADS = 1024  # more than any machine has use for; a process may not even start them


@dataclass(frozen=True)
class RuntimeConfig:
    """What the user chose. ``None`` means "decide for me" and is resolved by placement."""

    ram_bytes: int | None = None  # everything that the process holds; None = auto
    experts: str | int | None = None  # "25%", 96, "all": cap on experts in memory; None = bytes decide
    context_tokens: int | None = None
    policy: str = "horizon"
    predictor: str = "auto"
    prefetch: bool = True
    prefetch_depth: int | None = None  # layers ahead; None: the predictor's own
    num_threads: int | None = None
    allow_dense: bool = False
    warm_start: bool = True
    kv: str | None = None  # None: keys and values in the model's dtype; "q8_0": packed, lossy
    device: DeviceChoice | None = None  # None: the CPU alone
    scheduler: str = "hybrid"
    ram_staging: float = (
        STAGING_PER_TOP_K  # slots kept for reads in flight, times top_k; of the device's: below
    )
    vram_staging: float = STAGING_PER_TOP_K
    exclusive: bool = True  # what the device has leaves RAM first

    def __post_init__(self) -> None:
        if self.ram_bytes is not None and self.ram_bytes <= 0:
            raise ConfigError(f"ram must be positive, got {self.ram_bytes} bytes")
        if self.context_tokens is not None and not _is_count(self.context_tokens):
            raise ConfigError(f"context must be a positive number of tokens, got {self.context_tokens!r}")
        for name in ("ram_staging", "vram_staging"):
            if not 1 <= getattr(self, name) <= MAX_STAGING:
                raise ConfigError(f"{name} must be from 1 to {MAX_STAGING}, got {getattr(self, name)!r}")
        for name in ("policy", "predictor", "scheduler"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a name or an import path, got {getattr(self, name)!r:.80}")
        for name in ("prefetch", "allow_dense", "warm_start"):
            if getattr(self, name) not in (True, False):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r:.80}")
        if self.num_threads is not None and not _is_count(self.num_threads, MAX_THREADS):
            raise ConfigError(f"num_threads must be from 1 to {MAX_THREADS}, got {self.num_threads!r}")


def _is_count(value: object, high: int | None = None) -> bool:
    """Whether a user's number is a whole one from 1 to ``high``; True is an int in Python, and no number."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= (high or value)
