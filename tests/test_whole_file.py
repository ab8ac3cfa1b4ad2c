"""whole_file: a reader never sees half of a file, and what cannot be replaced is written to as it is."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from moe_offload.whole_file import whole_file, why_not


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with whole_file(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), ValueError("x")])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, error) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), whole_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.npz"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    """The last bytes leave the buffer when the file is closed; that may fail, too."""
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"), whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_stays_a_link_and_a_mode_stays(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    with whole_file(link, "w") as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_dangling_link_gets_its_file(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "later")
    with whole_file(tmp_path / "link", "w") as file:
        file.write("new")
    assert (tmp_path / "later").read_text() == "new"


def test_a_new_file_has_the_mode_that_the_user_asks_for(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path) -> None:
    """As /dev/stdout and /dev/null must: root would replace them by a file."""
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    with whole_file(path) as file:
        file.write(b"through")
    reader.join()
    assert got == [b"through"]
    assert path.is_fifo()


def test_a_long_name_has_room_for_its_partial_file(tmp_path) -> None:
    path = tmp_path / ("ß" * 127)
    with whole_file(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_why_not_names_the_reason(tmp_path) -> None:
    assert why_not(tmp_path / "x") is None
    assert why_not(tmp_path) == "is a folder; give a file in it"
    assert f"no folder {tmp_path / 'no'}" in str(why_not(tmp_path / "no" / "x"))
