"""The GPU benchmark's own parts, without a GPU: it keeps what it had, and says what it did not run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_card  # noqa: E402
import gpu_machine  # noqa: E402
import peer_llama_cuda as peer  # noqa: E402


def report_of(tmp_path: Path, seconds: float = 100.0) -> gpu.Report:
    return gpu.Report(tmp_path / "gpu.json", time.monotonic() + seconds, {"steps": {}})


def test_a_failed_step_keeps_its_rows_and_stops_nothing(tmp_path: Path) -> None:
    report = report_of(tmp_path)

    def fails() -> Iterator[dict[str, int]]:
        yield {"row": 1}
        raise ValueError("no luck")

    report.step("first", fails)
    report.step("second", lambda: iter([{"row": 2}]))
    kept = json.loads(report.path.read_text())["steps"]
    assert kept["first"]["rows"] == [{"row": 1}] and kept["first"]["status"] == "failed: ValueError: no luck"
    assert kept["second"]["status"] == "done"


def test_each_row_is_on_disk_before_the_next_is_begun(tmp_path: Path) -> None:
    report = report_of(tmp_path)

    def rows() -> Iterator[dict[str, int]]:
        yield {"row": 1}
        kept = json.loads(report.path.read_text())["steps"]["runs"]
        assert kept == {"status": "running", "rows": [{"row": 1}]}
        yield {"row": 2}

    report.step("runs", rows)
    assert report.content["steps"]["runs"]["status"] == "done"


def test_no_time_left_reads_not_run(tmp_path: Path) -> None:
    report = report_of(tmp_path, seconds=5)
    report.step("kernels", lambda: iter([{"row": 1}]), needs_s=20)
    assert report.content["steps"]["kernels"]["status"].startswith("not run: 5 s left")
    assert report.content["steps"]["kernels"]["rows"] == []


def test_a_run_that_was_cut_off_goes_on_from_its_rows(tmp_path: Path) -> None:
    """What was done is not done again, also after a second cut; another question begins anew."""
    first = report_of(tmp_path)
    first.content["commit"] = "a"
    first.step("bits", lambda: iter([{"bits": 1}]))
    done, cut = ({"method": m, "vram_percent": 25, "status": s} for m, s in (("x", "done"), ("y", "cut off")))
    first.content["steps"]["runs"] = {"status": "running", "rows": [done, cut]}
    first.write()
    for _ in range(2):
        second = report_of(tmp_path)
        second.content["commit"] = "a"
        second.resume()
        second.write()  # and cut off again
    second.step("bits", lambda: iter([{"bits": 2}]), once=True)
    assert second.content["steps"]["bits"]["rows"] == [{"bits": 1}]
    asked = {"vram_percent": 25}
    assert second.kept_row("runs", {"method": "x", **asked}) == {**done, "from_earlier_run": True}
    assert second.kept_row("runs", {"method": "y", **asked}) is None
    assert second.kept_row("runs", {"method": "x", "vram_percent": 50}) is None
    second.end()
    assert "earlier" not in json.loads(second.path.read_text())
    other = report_of(tmp_path)
    other.content["commit"] = "b"
    other.resume()
    assert other.kept == {}


def test_a_run_that_was_cut_off_tells_what_it_had() -> None:
    output = '{"load_s": 1.5}\nsome warning\n{"phase": "cold", "tokens_per_s": 3.0}\n{"phase": "wa'
    assert gpu.phases_of(output) == {"also": {"load_s": 1.5}, "cold": {"tokens_per_s": 3.0}}


def test_a_format_that_ends_its_process_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A faulty kernel leaves a process that gets nothing more from its card."""
    monkeypatch.setattr(gpu_card, "FORMATS", ("A", "B", "C"))

    def process(step: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for name in arguments["formats"]:
            yield {"begins": name}
            yield {"format": name, "tokens": 1}
            if name == "B":
                raise gpu_machine.Died("exit 1 misaligned address")
            yield {"format": name, "tokens": 5}

    monkeypatch.setattr(gpu_machine, "in_a_process", process)
    rows = list(gpu_machine.of_formats("bits", {}))
    assert [(row["format"], row.get("tokens", row.get("status"))) for row in rows] == [
        *(("A", 1), ("A", 5), ("B", 1), ("B", "failed: exit 1 misaligned address"), ("C", 1), ("C", 5))
    ]


def test_a_steps_process_gives_its_rows_and_the_reason_of_its_end() -> None:
    rows = list(gpu_machine.in_a_process("link", {"device": "emulated:link=8GB/s", "peak_bytes_per_s": 8e9}))
    assert {row["from"] for row in rows} == {"pageable", "pinned"}
    with pytest.raises(gpu_machine.Died, match=r"exit 1 KeyError: 'no such step'"):
        list(gpu_machine.in_a_process("no such step", {}))


def test_what_pytest_and_cuobjdump_print_is_read() -> None:
    log = "tests/test_a.py::test_x[card-Q4_0 a] PASSED [ 1%]\ntests/test_a.py::test_y[1] FAILED [ 2%]\n"
    log += "tests/test_a.py::test_z SKIPPED (no card) [ 3%]\nFAILED tests/test_a.py::test_y[1] - boom\n"
    counts = {"passed": 1, "skipped": 1, "failed": 1, "failures": ["test_a.py::test_y[1]"]}
    assert gpu_machine.outcomes(log) == counts
    several = "[gw0] [  1%] PASSED tests/test_a.py::test_x[card-Q4_0 a] \n"
    several += "[gw1] [ 98%] FAILED tests/test_a.py::test_y[1]\n"
    assert gpu_machine.outcomes(several) == {**counts, "skipped": 0}
    usage = " Function _Zk:\n  REG:40 STACK:16 SHARED:4608 LOCAL:0 CONSTANT[0]:1040 TEXTURE:0\n"
    assert gpu_machine.resources(usage) == {"_Zk": {"registers": 40, "stack_bytes": 16, "shared_bytes": 4608}}


LLAMA_BENCH = """ggml_cuda_init: found 1 CUDA devices
[
  {"n_prompt": 512, "n_gen": 0, "avg_ts": 812.5},
  {"n_prompt": 0, "n_gen": 48, "avg_ts": 31.25}
]
"""
COMPLETION = """common_perf_print: prompt eval time =     100.00 ms /   512 tokens (    0.20 ms per token,  5120.00 tokens per second)
common_perf_print:        eval time =    2000.00 ms /    47 runs   (   42.55 ms per token,    23.50 tokens per second)
"""  # noqa: E501


@pytest.mark.parametrize(
    ("output", "prefill", "decode"), [(LLAMA_BENCH, 812.5, 31.25), (COMPLETION, 5120.0, 23.5)]
)
def test_the_peers_speeds_are_read(output: str, prefill: float, decode: float) -> None:
    assert peer.speeds(output) == {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}


def test_without_a_source_every_row_of_the_peer_reads_not_run(tmp_path: Path) -> None:
    from moe_offload.config import DEMO_MODEL

    into = tmp_path / "gpu.json"
    into.write_text('{"steps": {}}')
    command = [sys.executable, str(ROOT / "bench" / "peer_llama_cuda.py"), "--model", str(DEMO_MODEL)]
    command += ["--vram-gib", "1", "--source", str(tmp_path / "none"), "--into", str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(rows) == 4 and all(row["status"].startswith("not run: no llama.cpp source") for row in rows)
    assert json.loads(into.read_text())["steps"]["llama.cpp"]["rows"] == rows


def test_a_source_that_lacks_a_setting_is_said_to(tmp_path: Path) -> None:
    """A program that knows everything but the cache; one that fails; one that is not there."""
    program = tmp_path / "llama-bench"
    program.write_text(
        "#!/bin/sh\ncase \"$*\" in --help) echo '-ncmoe -fitt --no-mmap';; *ncmoe*) cat "
        f"{tmp_path}/out;; *) echo no such model >&2; exit 1;; esac\n"
    )
    program.chmod(0o755)
    (tmp_path / "out").write_text(LLAMA_BENCH)
    args = peer.argparse.Namespace(model=Path("m.gguf"), prefill_tokens=8, decode_tokens=4)
    by_name = {
        s.name: peer.run(tmp_path / s.program, s, args, time.monotonic() + 60)
        for s in peer.settings(3, 12, 512)
    }
    assert by_name["--n-cpu-moe"]["decode_tokens_per_s"] == 31.25
    assert "-ncmoe 9" in by_name["--n-cpu-moe"]["arguments"]
    assert by_name["--fit"]["status"] == "failed: no such model"
    assert by_name["--moe-cache-mib"]["status"] == "not run: this source has no llama-completion"


def test_rounds_take_turns_and_their_medians_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([10.0, 100.0, 30.0, 300.0, 20.0, 500.0])
    asked = []

    def run(args: Any, report: Any, step: str, method: str, what: dict[str, Any]) -> dict[str, Any]:
        asked.append((what["round"], method))
        cold = {"tokens_per_s": 1.0 + what["round"], "digest": "x"}
        return {
            "method": method,
            **what,
            "status": "done",
            "cold": cold,
            "warm": {"tokens_per_s": next(speeds)},
        }

    monkeypatch.setattr(gpu, "run", run)
    report = report_of(tmp_path)
    report.content |= {"label": "emulated", "bench": "gpu", "device": "emulated", "commit": "abc"}
    args = gpu.argparse.Namespace(rounds=3, shares=[25], methods=["ours", "static_split"])
    report.step("runs", lambda: gpu.runs(args, report))
    assert asked == [(i, method) for i in range(3) for method in ("ours", "static_split")]
    assert gpu.table(report.content) == [
        "tok/s, cold / warm / after a change of topic, emulated, medians of 3:",
        "  25% ours: 2 / 20 / not run",
        "  25% static_split: 2 / 300 / not run",
    ]
    shown = gpu.summary(report.content)
    assert shown["warm_tokens_per_s_at_25_percent"] == {"ours": 20.0, "static_split": 300.0}
    report.content["steps"]["runs"]["rows"] = [
        {"method": "ours", "vram_percent": 25, "round": 0, "status": "cut off"}
    ]
    assert gpu.summary(report.content)["warm_tokens_per_s_at_25_percent"] == {"ours": "cut off"}


def test_modelled_rows_are_labelled_and_a_cache_is_never_more_than_its_slots() -> None:
    import gpu_modelled
    import numpy as np

    from moe_offload.planning.scheduler import SCHEDULERS, LayerWork
    from moe_offload.trace import read_trace

    trace = read_trace(ROOT / "bench" / "data" / "traces" / "en_prose.npz").head(60)
    layer = gpu_modelled._Layer(trace, 0, 8, is_static=False)
    for token in range(trace.num_tokens):
        ids = trace.experts[token, 0].astype(np.int64)
        n = len(ids)
        work = LayerWork(
            np.full(n, 4e-5), np.full(n, 1e-5), layer.resident[ids], np.ones(n, np.bool_), copy_s=5e-5
        )
        layer.step(ids, work, SCHEDULERS["hybrid"])
        assert layer.resident.sum() == 8
    everything = gpu_modelled.token_s(trace, "rtx-4060-laptop", 1.0, "on_demand")
    quarter = gpu_modelled.token_s(trace, "rtx-4060-laptop", 0.25, "on_demand")
    assert everything < quarter, "copies cost nothing"


def test_other_recordings_can_be_modelled(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import gpu_modelled

    monkeypatch.setattr(gpu_modelled, "PROFILES", ("rtx-4060-laptop",))
    monkeypatch.setattr(gpu_modelled, "SHARES", (0.25, 0.5))
    trace = ROOT / "bench" / "data" / "traces" / "fr_man.npz"
    arguments = ["--traces", str(trace), "--tokens", "40", "--expert-bytes", "13219200"]
    monkeypatch.setattr(sys, "argv", ["gpu_modelled.py", *arguments])
    gpu_modelled.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    quarter, half = said["rows"]
    assert said["label"] == quarter["label"] == half["label"] == "modelled"
    assert quarter["traces"] == ["fr_man.npz"] and said["tokens"] == 40
    assert half["expert_s_per_token"]["hybrid"] < quarter["expert_s_per_token"]["hybrid"]
    larger = quarter["expert_s_per_token"]["static_layers"] / half["expert_s_per_token"]["static_layers"]
    assert larger > 1 and min(quarter["others_over_ours"].values()) >= 0.9


def test_without_a_card_everything_reads_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_machine, "build", lambda: iter([{"built": False}]))
    off = {"on": False, "reason": "no NVIDIA driver was found", "devices": []}
    monkeypatch.setattr(gpu_machine, "card_report", lambda: off)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "new" / "gpu.json")])
    with pytest.raises(SystemExit):
        gpu.main()
    steps = json.loads((tmp_path / "new" / "gpu.json").read_text())["steps"]
    assert steps["build"]["status"] == "done"
    not_run = {name: step["status"] for name, step in steps.items() if step["status"] != "done"}
    assert len(not_run) == 13 and set(not_run.values()) == {"not run: no card: no NVIDIA driver was found"}
