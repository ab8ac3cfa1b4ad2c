"""Fetch a model by name, when it is asked for: what is missing of it, resumed, into Hugging Face's cache.

The one place that goes to the network. huggingface_hub does the transfer; here it is decided which
files, and whether the disk has room for them.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_offload.config import gib
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.storage.gguf_parts import SPLIT_NAME
from moe_offload.storage.model_files import RepoName, choose_models, hub_cache, parse_repo_name

RESERVE_BYTES = 1 << 30  # left free on the disk
_TEXT_FILES = (
    "config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer*", "vocab.*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
)  # fmt: skip
_NOT_WEIGHTS = ("consolidated*", "adapter*")


def fetch(model: str | Path | None, say: Callable[[str], None] | None = None) -> Path:
    """Fetch ``org/name[@revision][:part]`` and return its folder in the cache; what is there stays.

    Args:
        say: takes one line about what will be fetched; default: stderr.

    Raises:
        ConfigError: ``model`` is no name, or the network is switched off by HF_HUB_OFFLINE.
        CheckpointError: the hub does not have it or cannot be reached, or the disk is too small.
    """
    name = parse_repo_name(str(model)) if model is not None else None
    if model is not None and Path(model).expanduser().exists():
        return Path(model).expanduser()
    if name is None:
        raise ConfigError(f"--download: {model} is no model's name; org/name is wanted")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(f"--download: HF_HUB_OFFLINE is set, so {name.repo} cannot be fetched; unset it")
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = files_to_fetch(name, sizes)
        _check_room(name, _missing(name, str(info.sha), wanted), sizes, say or _say)
        return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=_escaped(wanted)))
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # whatever the hub's client and its transport raise
        raise CheckpointError(
            f"{name.repo}@{name.revision}: cannot be fetched: {_first_line(error)}; what came is kept, "
            "the same command goes on from there"
        ) from error


def files_to_fetch(name: RepoName, sizes: Mapping[str, int]) -> list[str]:
    """Return the files of the repository that the model needs: one GGUF with its parts, or the folder's.

    Raises:
        CheckpointError: there are several GGUF models and the name chooses none, or no weights at all.
    """
    models = choose_models([file for file in sizes if file.endswith(".gguf")], name.part)
    weights = [
        file
        for file in sizes
        if file.endswith(".safetensors") and "/" not in file and not _matches(file, _NOT_WEIGHTS)
    ]
    if weights and name.part is None:
        return sorted(
            [*weights, *(file for file in sizes if "/" not in file and _matches(file, _TEXT_FILES))]
        )
    if len(models) == 1:
        prefix = SPLIT_NAME.sub(r"\g<prefix>", models[0])
        return sorted(
            file for file in sizes if file == models[0] or SPLIT_NAME.sub(r"\g<prefix>", file) == prefix
        )
    if not models:
        raise CheckpointError(
            f"{name.repo}@{name.revision}: no safetensors and no .gguf file"
            + (f" with {name.part!r} in its name" if name.part else "")
        )
    raise CheckpointError(
        f"{name.repo}@{name.revision}: has {len(models)} models: {', '.join(models[:12])}; choose one as "
        f"{name.repo}:PART with a part of its name (:Q4_K_M)"
    )


def _missing(name: RepoName, commit: str, wanted: Sequence[str]) -> list[str]:
    """Return the files that the cache does not hold yet."""
    snapshot = hub_cache() / f"models--{name.repo.replace('/', '--')}" / "snapshots" / commit
    return [file for file in wanted if not (snapshot / file).exists()]


def _check_room(
    name: RepoName, missing: Sequence[str], sizes: Mapping[str, int], say: Callable[[str], None]
) -> None:
    """Say what will be fetched; refuse what the disk cannot hold."""
    cache = hub_cache()
    num_bytes = sum(sizes[file] for file in missing)
    if not missing:
        say(f"{name.repo}@{name.revision}: all files are in {cache}")
        return
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if num_bytes + RESERVE_BYTES > free_bytes:
        raise CheckpointError(
            f"{name.repo}@{name.revision}: {len(missing)} files of {gib(num_bytes)} are to be fetched, but "
            f"{existing} has {gib(free_bytes)} free, of which {gib(RESERVE_BYTES)} stay free; make room, or "
            "set HF_HOME to a larger disk"
        )
    say(f"fetching {name.repo}@{name.revision}: {len(missing)} files, {gib(num_bytes)}, into {cache}")


def _escaped(files: Sequence[str]) -> list[str]:
    """Names as patterns that match themselves only."""
    return [file.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for file in files]


def _matches(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _first_line(error: Exception) -> str:
    text: Any = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _say(line: str) -> None:
    print(f"moe-offload: {line}", file=sys.stderr)
