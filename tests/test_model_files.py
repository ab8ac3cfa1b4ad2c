"""Models where they are: by path, by magic, by name in the caches of other tools; fetched only when asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moe_offload import CheckpointError, ConfigError, cli
from moe_offload.config import DEMO_MODEL
from moe_offload.storage import download
from moe_offload.storage.checkpoint import locate, open_checkpoint
from moe_offload.storage.model_files import parse_repo_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home with Hugging Face's cache in it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def put_in_cache(hub: Path, repo: str, files: dict[str, Path], revision: str = "main") -> Path:
    """Lay out a snapshot as huggingface_hub does: blobs by digest, links by name."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for name, source in files.items():
        blob = folder / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    return snapshot


def test_a_folder_model_is_found_by_its_name(hub: Path, tiny_moe: Path) -> None:
    files = {path.name: path for path in tiny_moe.iterdir()}
    snapshot = put_in_cache(hub, "org/Tiny-MoE.v1", files)
    for name in ("org/Tiny-MoE.v1", f"org/Tiny-MoE.v1@{COMMIT}", snapshot.parents[1]):
        assert locate(name) == ("safetensors", snapshot)
    assert open_checkpoint("org/Tiny-MoE.v1").spec == open_checkpoint(tiny_moe).spec


def test_one_of_several_files_is_chosen_by_a_part_of_its_name(hub: Path) -> None:
    names = ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "BF16/tiny-BF16.gguf", "mmproj-F16.gguf")
    snapshot = put_in_cache(hub, "org/tiny-GGUF", dict.fromkeys(names, DEMO_MODEL))
    for name, found in (
        ("org/tiny-GGUF:Q4_K_M", names[0]), ("org/tiny-GGUF:q8_0", names[1]),
        ("org/tiny-GGUF/tiny-Q8_0.gguf", names[1]), ("org/tiny-GGUF:BF16", names[2]),
        ("org/tiny-GGUF/BF16/tiny-BF16.gguf", names[2]),
    ):  # fmt: skip
        assert locate(name) == ("gguf", snapshot / found)
    with pytest.raises(CheckpointError, match=r"found 2 models: tiny-Q4_K_M.gguf, tiny-Q8_0.gguf"):
        locate("org/tiny-GGUF")
    with pytest.raises(CheckpointError, match=r"with 'Q6_K' in its name is wanted"):
        locate("org/tiny-GGUF:Q6_K")


def test_a_revision_is_a_snapshot_of_its_own(hub: Path) -> None:
    put_in_cache(hub, "org/tiny", {"tiny.gguf": DEMO_MODEL}, revision="v2")
    assert locate("org/tiny@v2")[0] == "gguf"
    with pytest.raises(CheckpointError, match=r"revision main"):
        locate("org/tiny")


def test_lm_studios_tree_is_searched(hub: Path) -> None:
    folder = Path(os.environ["HOME"], ".lmstudio", "models", "org", "tiny-GGUF")
    folder.mkdir(parents=True)
    shutil.copyfile(DEMO_MODEL, folder / "tiny.gguf")
    shutil.copyfile(DEMO_MODEL, folder / "mmproj-tiny.gguf")
    assert locate("org/tiny-GGUF") == ("gguf", folder / "tiny.gguf")


def test_what_is_not_there_says_how_to_get_it(hub: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("Qwen/Qwen3-30B-A3B")
    message = str(caught.value)
    assert "add --download, or run: hf download Qwen/Qwen3-30B-A3B" in message and "\n" not in message
    assert str(hub) in message


def test_the_way_to_get_it_names_revision_and_part(hub: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"hf download org/tiny-GGUF --revision v2 --include \"\*Q4_0\*\""
    ):
        locate("org/tiny-GGUF@v2:Q4_0")


def test_a_link_to_nothing_is_no_models_name(hub: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/gone").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"models/gone: No such file") as caught:
        locate("models/gone")
    assert "hf download" not in str(caught.value)
    snapshot = put_in_cache(hub, "org/tiny", {"tiny.gguf": DEMO_MODEL})
    (snapshot / "tiny.gguf").resolve().unlink()
    with pytest.raises(CheckpointError, match="what it links to is missing: fetch it again"):
        open_checkpoint("org/tiny")


def test_a_path_that_is_there_comes_before_a_name(hub: Path, tmp_path: Path, monkeypatch: Any) -> None:
    put_in_cache(hub, "org/tiny", {"other.gguf": DEMO_MODEL})
    monkeypatch.chdir(tmp_path)
    Path("org/tiny").mkdir(parents=True)
    shutil.copyfile(DEMO_MODEL, "org/tiny/mine.gguf")
    assert locate("org/tiny") == ("gguf", Path("org/tiny/mine.gguf"))


@pytest.mark.parametrize("name", ["sha256-0a1b", "blob.json", "weights.safetensors", "no suffix ä 模型"])
def test_a_gguf_is_known_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    target = tmp_path / "Modèles de langue" / name
    target.parent.mkdir()
    shutil.copyfile(DEMO_MODEL, target)
    link = tmp_path / "link"
    link.symlink_to(target)
    for path in (target, link):
        assert open_checkpoint(path).spec == open_checkpoint(DEMO_MODEL).spec


def test_a_safetensors_file_is_known_by_its_first_bytes(tiny_moe: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_moe / "model.safetensors", tmp_path / "blob")
    with pytest.raises(CheckpointError, match=r"is one file of a Hugging Face folder"):
        open_checkpoint(tmp_path / "blob")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_written_beside_a_model(kind: str, tiny_moe: Path, tmp_path: Path) -> None:
    """A read-only folder with a space and a letter beyond ASCII in its name answers, and stays as it was."""
    folder = tmp_path / "nur lesbär"
    if kind == "folder":
        shutil.copytree(tiny_moe, folder)
    else:
        folder.mkdir()
        shutil.copyfile(DEMO_MODEL, folder / "tiny.gguf")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    folder.chmod(0o555)
    command = ["generate", "--model", str(folder), "--ram", "8GiB", "--prompt", "hi", "--raw"]
    code = cli.main([*command, "--max-new-tokens", "3"])
    folder.chmod(0o755)
    assert code == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "text", ["org", "a/b/c", "/abs/path", "./rel/x", "../x/y", "org/", "org/na me", "org/name@../../x"]
)
def test_what_cannot_be_a_name_is_none(text: str) -> None:
    assert parse_repo_name(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://huggingface.co/org/tiny", ("org/tiny", "main", None)),
        ("https:/huggingface.co/org/tiny/", ("org/tiny", "main", None)),  # as Path writes it
        ("huggingface.co/org/tiny/tree/v1", ("org/tiny", "v1", None)),
        ("https://hf.co/org/big/blob/main/sub/big-Q8_0.gguf", ("org/big", "main", "sub/big-Q8_0.gguf")),
        ("https://huggingface.co/org/big/resolve/main/b.gguf?download=true", ("org/big", "main", "b.gguf")),
        ("hf.co/org/big:Q4_K_M", ("org/big", "main", "Q4_K_M")),
    ],
)
def test_the_address_of_a_models_page_is_its_name(text: str, expected: tuple[str, str, str | None]) -> None:
    name = parse_repo_name(text)
    assert name is not None
    assert (name.repo, name.revision, name.part) == expected


@pytest.mark.parametrize(
    "text", ["https://example.com/org/tiny", "https://hf.co/org", "https://hf.co/org/a/b/c"]
)
def test_other_addresses_are_no_names(text: str) -> None:
    assert parse_repo_name(text) is None


class StandIn(ThreadingHTTPServer):
    """As much of the hub as a download needs; breaks off the first transfer of what ``breaks`` names."""

    def __init__(self, files: dict[str, bytes], breaks: str = "") -> None:
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.files, self.breaks = files, breaks
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class StandInHandler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.answer(json.dumps(entries).encode())
            return
        if path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps({**info, "private": False, "tags": [], "downloads": 0}).encode())
            return
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in self.server.files:
            self.answer(b"", status=404)
            return
        self.send_file(name, self.server.files[name])

    def send_file(self, name: str, data: bytes) -> None:
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.server.requests.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        is_broken = self.command == "GET" and self.server.breaks == name
        if is_broken:
            self.server.breaks = ""
        self.answer(rest, 206 if start else 200, headers, sent=len(rest) // 2 if is_broken else None)

    def answer(
        self, data: bytes, status: int = 200, headers: dict[str, str] | None = None, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    files = {
        "tiny-Q4.gguf": DEMO_MODEL.read_bytes(), "tiny-F32.gguf": b"never fetched", "README.md": b"# tiny",
    }  # fmt: skip
    server = StandIn(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def inspect(server: StandIn, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_offload", "inspect", "--json", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1", **environment},
        timeout=120,
    )


def test_a_download_is_asked_for_told_and_resumed(hub: Path, stand_in: StandIn) -> None:
    stand_in.breaks = "tiny-Q4.gguf"
    refused = inspect(stand_in, "--model", "org/tiny:Q4")
    assert refused.returncode == 2 and "add --download" in refused.stderr and not stand_in.requests
    done = inspect(stand_in, "--model", "org/tiny:Q4", "--download")
    if done.returncode:  # a broken transfer: the same command goes on from there
        assert "the same command goes on from there" in done.stderr
        done = inspect(stand_in, "--model", "org/tiny:Q4", "--download")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"].startswith(str(hub))
    assert (
        f"moe-offload: fetching org/tiny@main: 1 files, {len(DEMO_MODEL.read_bytes()) / 2**20:.2f} MiB"
        in done.stderr
    )
    assert {name for name, _ in stand_in.requests} == {"tiny-Q4.gguf"}
    assert any(wanted is not None for _, wanted in stand_in.requests), "nothing was resumed"
    count = len(stand_in.requests)
    again = inspect(stand_in, "--model", "org/tiny:Q4", "--download")
    assert again.returncode == 0 and "all files are in" in again.stderr and len(stand_in.requests) == count


def test_a_download_needs_the_network_and_a_name(hub: Path, stand_in: StandIn) -> None:
    offline = inspect(stand_in, "--model", "org/tiny:Q4", "--download", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr
    with pytest.raises(ConfigError, match="no model's name; org/name is wanted"):
        download.fetch("just-a-word")
    assert download.fetch(DEMO_MODEL) == DEMO_MODEL


def test_a_disk_without_room_is_refused_with_the_numbers(hub: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 << 30, 8 << 30, 2 << 30)
    )
    name = parse_repo_name("org/tiny")
    assert name is not None
    with pytest.raises(CheckpointError, match=r"2 files of 1.50 GiB .* has 2.00 GiB free, of which 1.00 GiB"):
        download._check_room(name, ["a", "b"], {"a": 1 << 30, "b": 1 << 29}, print)
    lines: list[str] = []
    download._check_room(name, ["a"], {"a": 1 << 29}, lines.append)
    assert "fetching org/tiny@main: 1 files, 512.00 MiB" in lines[0]


def test_only_what_the_model_needs_is_fetched() -> None:
    folder = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    others = ["README.md", "original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
    parts = [f"Q8_0/big-Q8_0-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    sizes = dict.fromkeys([*folder, *others, *parts, "big-Q4_0.gguf", "mmproj.gguf"], 1)
    plain, eight = parse_repo_name("org/big"), parse_repo_name("org/big:Q8_0")
    assert plain is not None and eight is not None
    assert download.files_to_fetch(plain, sizes) == sorted(folder)
    assert download.files_to_fetch(eight, sizes) == parts
    only_gguf = {name: 1 for name in sizes if name.endswith(".gguf")}
    with pytest.raises(CheckpointError, match=r"has 2 models: .*choose one as org/big:PART"):
        download.files_to_fetch(plain, only_gguf)
