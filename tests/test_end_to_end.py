"""bench/end_to_end.py: its arithmetic on made-up records, its cgroups, and a toy run of the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import cgroup  # noqa: E402
import end_to_end_figures as figures  # noqa: E402
import end_to_end_report as report  # noqa: E402
import end_to_end_runs as runs  # noqa: E402
import peer_llama_cpp as peer  # noqa: E402

from moe_offload.config import DEMO_MODEL, MIB  # noqa: E402
from moe_offload.planning.cost_model import TokenBytes, decode_floor_s, prefill_floor_s  # noqa: E402
from moe_offload.storage.checkpoint import open_checkpoint  # noqa: E402

TOKEN = TokenBytes(dense_bytes=400, expert_bytes=500, kv_bytes=100)
COUNTERS = {
    "hits": 60, "prefetch_hits": 20, "misses": 20, "decode_steps": 10, "demand_bytes": 1000,
    "prefetch_useful_bytes": 400, "prefetch_late_bytes": 100, "prefetch_wasted_bytes": 50, "stall_s": 0.5,
}  # fmt: skip


def ours(round_idx, token_s, prefill_s=2.0, **fields):
    row = {
        "mix": "m", "place": "p", "program": "ours", "round": round_idx, "prefill_s": prefill_s,
        "token_s": token_s, "decode_counters": COUNTERS, "choices": [1, 2], "peak_bytes": 7,
        "counted_read_bytes": 100, "io_read_bytes": 101, "prefill_stream_bytes": 300,
    }  # fmt: skip
    return row | fields


def llama(round_idx, name, token_s, prefill_s):
    return {
        "mix": "m", "place": "p", "program": "llama", "round": round_idx, "prefill_s": prefill_s,
        "token_s": token_s, "settings": {"name": name},
    }  # fmt: skip


def bandwidth(round_idx, ram, disk, place="p"):
    return {
        "mix": "m", "place": place, "program": "bandwidth", "round": round_idx,
        "ram_bytes_per_s": ram, "disk_bytes_per_s": disk,
    }  # fmt: skip


def test_a_token_reads_all_but_the_embedding_of_the_dense_weights_and_top_k_experts():
    checkpoint = open_checkpoint(DEMO_MODEL)
    token = report.bytes_per_token(checkpoint, 100)
    spec, embedding = checkpoint.spec, checkpoint.dense["model.embed_tokens.weight"].span.num_bytes
    tied = "lm_head.weight" not in checkpoint.dense
    one_expert = checkpoint.experts.layouts[0].expert_bytes
    assert token.expert_bytes == spec.num_hidden_layers * spec.top_k * one_expert
    assert token.dense_bytes == checkpoint.dense_bytes - (0 if tied else embedding)
    assert token.kv_bytes == sum(spec.kv_elements_per_token) * 100 * 4


def test_a_token_takes_as_long_as_the_slower_of_memory_and_disk():
    assert decode_floor_s(TOKEN, ram_bytes_per_s=500.0) == 2.0
    assert decode_floor_s(TOKEN, ram_bytes_per_s=500.0, missed_bytes=90, disk_bytes_per_s=30.0) == 3.0
    assert prefill_floor_s(600, 200.0) == 3.0


def test_ratios_pair_the_runs_of_a_round_at_the_peers_best_settings():
    rows = [
        ours(0, [0.1, 0.1]), ours(1, [0.2, 0.2]),
        llama(0, "good", [0.2], 8.0), llama(0, "bad", [0.9], 4.0),
        llama(1, "good", [0.3], 8.0), llama(1, "bad", [0.9], 4.0),
    ]  # fmt: skip
    assert figures.best_variants(rows, "m", "p") == {"good", "bad"}
    result = figures.place_result(rows, "m", "p", TOKEN, 100)
    assert result["peer_decode_settings"] == "good" and result["peer_prefill_settings"] == "bad"
    assert result["decode_ratio"] == {"median": 1.75, "min": 1.5, "max": 2.0}
    assert result["prefill_ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert result["ours_prefill"]["median"] == 50.0


def test_one_slow_token_moves_the_mean_and_not_the_median(capsys):
    rows = [ours(0, [0.1, 0.1, 0.8], place="ram"), llama(0, "s", [0.2, 0.2], 8.0) | {"place": "ram"}]
    result = figures.place_result(rows, "m", "ram", TOKEN, 100)
    assert result["ours_decode"]["median"] == pytest.approx(3.0)
    assert result["ours_median_decode"]["median"] == 10.0 and result["peer_median_decode"]["median"] == 5.0
    assert result["median_decode_ratio"]["median"] == 2.0 and result["decode_ratio"]["median"] < 1.0
    report.report(rows, {"m": DEMO_MODEL}, 100)
    assert "| 10 (10–10) | 5 (5–5) | 2x (2x–2x) |" in capsys.readouterr().out


def test_ceilings_come_from_what_was_missed_and_measured_beside_the_run():
    rows = [ours(0, [0.5, 0.5]), ours(1, [0.5, 0.5]), bandwidth(0, 10000.0, 500.0), bandwidth(1, 4000.0, 1e9)]
    rows.append(bandwidth(0, 1.0, 1.0, place="elsewhere"))
    result = figures.place_result(rows, "m", "p", TOKEN, 100)
    assert result["needed_read_bytes_per_token"] == 150 and result["wasted_read_bytes_per_token"] == 5
    # Round 0: 150 of 500 B/s are 0.3 s of 0.5 s; round 1: 1000 of 4000 B/s are 0.25 s.
    assert result["decode_of_ceiling"] == {"median": pytest.approx(0.55), "min": 0.5, "max": 0.6}
    assert result["prefill_of_disk"]["max"] == pytest.approx(0.3)
    assert result["hit_rate"] == 0.8 and result["resident_rate"] == 0.6
    assert result["io_counter_error"] == pytest.approx(0.01)


def test_different_tokens_in_two_places_are_said():
    rows = [ours(0, [0.5]), ours(0, [0.5], place="ram", choices=[1, 2, 3])]
    assert figures.place_result(rows, "m", "p", TOKEN, 100)["same_tokens_everywhere"]
    rows.append(ours(1, [0.5], choices=[1, 3]))
    assert not figures.place_result(rows, "m", "p", TOKEN, 100)["same_tokens_everywhere"]


def test_a_failed_run_is_named_and_does_not_stop_the_report(capsys):
    rows = [ours(0, [0.5], mix="q4_0", place="ram"), {**llama(0, "s", [], None), "mix": "q4_0", "key": "k"}]
    rows[1] |= {"error": "exit status -9: ", "place": "2GiB"}
    results = report.report(rows, {"q4_0": DEMO_MODEL}, 10)
    assert [r["place"] for r in results] == ["ram"]
    assert "failed: k: exit status -9" in capsys.readouterr().out


def test_resuming_keeps_what_was_measured_and_tries_again_what_failed(tmp_path):
    path = tmp_path / "records.jsonl"
    first = runs.Records(path, keep=False)
    first.add(runs.Run("q4_0", "ram", "llama", 1, peer.IN_MEMORY[0]), {"prefill_s": 1.0})
    first.add(runs.Run("q4_0", "ram", "ours", 1), {"error": "killed"})
    second = runs.Records(path, keep=True)
    assert f"q4_0/ram/llama/{peer.IN_MEMORY[0].name}/1" in second
    assert second.rows == first.rows[:1] and second.rows[0]["prefill_s"] == 1.0
    assert "q4_0/ram/ours/1" not in second  # it failed: it is tried again
    assert not runs.Records(path, keep=False).rows


def test_a_place_may_have_a_longer_prompt_and_the_peer_any_batch_that_it_fills():
    assert [figures.prompt_tokens_of(place, 512) for place in ("ram", "2GiB@4096")] == [512, 4096]
    assert runs.Run("m", "2GiB@4096", "ours", 0).memory == "2GiB"
    assert peer.with_batches(peer.IN_MEMORY, 0) == peer.IN_MEMORY
    batches = [settings.batch_tokens for settings in peer.with_batches(peer.IN_CGROUP, 3000)]
    assert batches == [512, 2048]
    rows = [ours(0, [0.5], mix="q4_0", place="ram"), ours(0, [0.5], mix="q4_0", place="ram@200", choices=[9])]
    short, long = report.report(rows, {"q4_0": DEMO_MODEL}, 100)
    for row in (short, long):
        assert row["same_tokens_everywhere"], "prompts have tokens of their own"
    assert (short["ours_prefill"]["max"], long["ours_prefill"]["max"]) == (50.0, 100.0)
    assert long["token_bytes"] > short["token_bytes"]


def test_a_process_in_a_cgroup_gets_no_more_than_its_limit():
    try:
        group = cgroup.MemoryCgroup(64 * MIB)
    except cgroup.CgroupUnavailableError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    take = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); bytearray(int(sys.argv[2]) << 20)"
    with group:
        codes = [
            subprocess.run([sys.executable, "-c", take, str(group.procs), size], check=False).returncode
            for size in ("16", "200")
        ]
        assert 16 * MIB < (group.peak_bytes() or 17 * MIB) <= 64 * MIB
    assert codes[0] == 0 and codes[1] == -9
    assert not group.folder.exists()


def fake_mounts(root: Path, line: str, *folders: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    for folder in folders:
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True)
    return root / "sys/fs/cgroup"


def test_version_2_is_asked_for_memory_beside_our_own_group(tmp_path):
    mounts = fake_mounts(tmp_path, "0::/user/session", "user/session")
    (mounts / "cgroup.controllers").write_text("memory cpu")
    (mounts / "user/cgroup.subtree_control").write_text("cpu")
    group = cgroup.MemoryCgroup(123, root=tmp_path)
    assert group.folder.parent == mounts / "user" and group.version == 2
    assert (group.folder / "memory.max").read_text() == "123"
    assert (mounts / "user/cgroup.subtree_control").read_text() == "+memory"


def test_without_a_memory_controller_the_reason_is_given(tmp_path):
    fake_mounts(tmp_path, "3:cpu:/", "cpu")
    with pytest.raises(cgroup.CgroupUnavailableError, match="no memory controller"):
        cgroup.MemoryCgroup(1, root=tmp_path)


@pytest.mark.slow
def test_a_quick_run_measures_everything_and_says_so_in_its_last_line(tmp_path):
    command = [sys.executable, str(BENCH / "end_to_end.py"), "--quick", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    places = {row["place"]: row for row in result["results"]}
    assert set(places) == ({"ram", "1GiB"} if cgroup.unavailable_reason() is None else {"ram"})
    for row in places.values():
        assert row["same_tokens_everywhere"] and row["ours_decode"]["min"] > 0
        assert ("decode_ratio" in row) == peer.is_installed()
        assert 0 < row["decode_of_ceiling"]["max"] < 1.5
    assert "one flipped byte in a used expert changes the logits" in done.stdout
    assert "failed:" not in done.stdout
