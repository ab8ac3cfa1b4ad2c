"""Where a model is: a path, or ``org/name`` in the caches of Hugging Face and LM Studio. Nothing is fetched.

A file is known by its first bytes and not by its suffix, since other tools keep models as blobs.
Nothing is ever written beside a model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from moe_offload.errors import CheckpointError
from moe_offload.storage.gguf import MAGIC
from moe_offload.storage.gguf_parts import SPLIT_NAME
from moe_offload.storage.header_reader import HeaderReader

# org/name, then a revision (@v1), then which file of several: a part of its name (:Q4_K_M) or its path.
_REPO_NAME = re.compile(
    r"(?P<org>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w./-]+?))?(?::(?P<part>[\w.-]+)|/(?P<file>[^:@]+\.gguf))?"
)


# A page of the hub, as a browser or another tool names it; Path has made one slash of two.
_PAGE = re.compile(
    r"(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/:@?]+/[^/:@?]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?]+)(?P<file>/[^?:]+\.gguf)?)?/?(?:\?.*)?(?P<part>:[\w.-]+)?"
)


class RepoName:
    """A model's name on the Hugging Face hub.

    Attributes:
        repo: "org/name".
        revision: branch, tag or commit.
        part: chooses one of several GGUF files: a part of its name, or its path in the repository.
    """

    def __init__(self, repo: str, revision: str, part: str | None) -> None:
        self.repo, self.revision, self.part = repo, revision, part


def parse_repo_name(text: str) -> RepoName | None:
    """Return the name that ``text`` is, or the address of its page; None when it cannot be one."""
    if page := _PAGE.fullmatch(text):
        revision = f"@{page['revision']}" if page["revision"] else ""
        text = f"{page['repo']}{revision}{page['file'] or page['part'] or ''}"
    match = _REPO_NAME.fullmatch(text)
    if match is None or ".." in text:
        return None
    part = match["part"] or match["file"]
    return RepoName(f"{match['org']}/{match['name']}", match["revision"] or "main", part)


def locate(path: str | Path) -> tuple[str, Path]:
    """Return ("safetensors", folder) or ("gguf", file) for what the user gave.

    Raises:
        CheckpointError: there is nothing that can be read; says how to get it.
    """
    found, part = _existing(path)
    if not found.is_dir():
        return "gguf", _checked_file(found)
    found = _snapshot_in(found)
    has_config = (found / "config.json").exists()
    if has_config and (part is None and (_holds(found, "*.safetensors") or not _holds(found, "*.gguf"))):
        return "safetensors", found
    return "gguf", choose_gguf(found, part)


def _existing(path: str | Path) -> tuple[Path, str | None]:
    """Return what is on disk under this path or name, and which part of it is wanted."""
    try:
        given = Path(path).expanduser()
        given.stat()
        return given, None
    except (OSError, ValueError, RuntimeError) as error:
        name = parse_repo_name(str(path))
        if name is None or os.path.islink(Path(path).expanduser()):
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CheckpointError(
                f"{path}: {reason}; a Hugging Face folder (config.json and safetensors) or a .gguf file is "
                "wanted, or the name of a model (org/name) that was downloaded"
            ) from error
    folder = _cached_snapshot(name) or _lm_studio_folder(name)
    if folder is None:
        raise CheckpointError(
            f"{path}: no such path, and no model of this name (revision {name.revision}) in {hub_cache()} or "
            f"LM Studio's folders; add --download, or run: {_download_command(name)}"
        )
    return folder, name.part


def _download_command(name: RepoName) -> str:
    revision = "" if name.revision == "main" else f" --revision {name.revision}"
    part = "" if name.part is None else f' --include "*{name.part}*"'
    return f"hf download {name.repo}{revision}{part}"


def _checked_file(path: Path) -> Path:
    with HeaderReader(path) as file:
        head = file.read_up_to(0, 9)
        if not head:
            file.fail("is empty; fetch it again")
        is_safetensors = len(head) == 9 and head[8:9] == b"{" and head[4:8] == bytes(4)
        if not head.startswith(MAGIC) and (is_safetensors or path.suffix in (".safetensors", ".json")):
            file.fail(f"is one file of a Hugging Face folder; give the folder {path.parent}")
    return path


def choose_gguf(folder: Path, part: str | None = None) -> Path:
    """Return the GGUF of a folder, whole or the first of its parts; ``part`` chooses among several.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    names = sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*.gguf"))
    if part is None:
        names = [name for name in names if "/" not in name] or names
    models = choose_models(names, part)
    if len(models) == 1:
        return folder / models[0]
    wanted = f" with {part!r} in its name" if part else ""
    found = f"found {len(models)} models: {', '.join(models[:8])}" if models else "found neither"
    raise CheckpointError(
        f"{folder}: a folder with config.json and safetensors, or with one .gguf model{wanted} is wanted; "
        f"{found}. Give the path of the model itself, or org/name:PART"
    )


def choose_models(names: Sequence[str], part: str | None) -> list[str]:
    """Return the first file of each GGUF model among ``names``; vision projectors are none."""
    if part is not None:
        exact = [name for name in names if name == part]
        names = exact or [name for name in names if part.lower() in Path(name).name.lower()]
    models = {SPLIT_NAME.sub(r"\g<prefix>", name): name for name in sorted(names, reverse=True)}
    return sorted(name for name in models.values() if not Path(name).name.startswith("mmproj"))


def hub_cache() -> Path:
    """Return the folder where Hugging Face's tools keep what they fetched."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expanduser(cache))
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("HF_HOME") or f"{base}/huggingface")) / "hub"


def _cached_snapshot(name: RepoName) -> Path | None:
    return _snapshot(hub_cache() / f"models--{name.repo.replace('/', '--')}", name.revision)


def _snapshot(folder: Path, revision: str) -> Path | None:
    """Return the snapshot of a revision: a branch or tag by ``refs``, a commit by its own name."""
    reference = folder / "refs" / revision
    commit = revision
    if reference.is_file():
        with HeaderReader(reference) as file:
            commit = file.read_up_to(0, 256).decode("utf-8", "replace").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def _snapshot_in(folder: Path) -> Path:
    """Return the newest snapshot where ``folder`` is a model's place in the cache, else ``folder``."""
    if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
        return _snapshot(folder, "main") or folder
    return folder


def _lm_studio_folder(name: RepoName) -> Path | None:
    homes = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
    folders = (Path(os.path.expanduser(home)) / name.repo for home in homes)
    return next((folder for folder in folders if folder.is_dir()), None)


def _holds(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None
