"""The cache hit-rate benchmark: its statistics by hand and by brute force, its report, its refusals."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import cache_hit_rate
from trace_statistics import segment_cache_hit_rates, segment_routing

import moe_offload
from moe_offload.planning.eviction import LruPolicy
from moe_offload.trace import make_trace, read_trace, sequence_digests, write_trace


def random_trace(seed, seq_len=(7, 5), num_layers=2, num_experts=5, top_k=2):
    generator = np.random.default_rng(seed)
    experts = [
        [generator.choice(num_experts, top_k, replace=False) for _ in range(num_layers)]
        for _ in range(sum(seq_len))
    ]
    return make_trace(np.array(experts), num_experts=num_experts, seq_len=seq_len)


def one_layer(*rows, **fields):
    return make_trace(np.array(rows).reshape(len(rows), 1, -1), **fields)


def test_srp_of_a_trace_worked_out_by_hand():
    """Experts a a b, windows of 2: aa -> f = 2 0, ab -> f = 1 1.

    R = [f >= 2]: F1 = 2 * 2 / (2 + 4) = 2/3. R = [f >= 1]: F1 = 2 * 4 / (2 * 3 + 4) = 4/5, and three
    activations in two windows: rho 1.5. R = all: 2 * 4 / (2 * 4 + 4) = 2/3.
    """
    result = segment_routing(one_layer([0], [0], [1]), 2)
    assert (result.srp, result.alpha, result.rho) == (pytest.approx(0.8), 1, 1.5)
    assert segment_routing(one_layer([0], [0], [1]), 4) is None


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_srp_is_the_best_f1_of_every_threshold(seed, window):
    trace = random_trace(seed)
    uses = []
    for start, end in ((0, 7), (7, 12)):
        for first in range(start, end - window + 1):
            for layer in range(2):
                chosen = trace.experts[first : first + window, layer].reshape(-1)
                uses += [int((chosen == expert).sum()) for expert in range(5)]
    f1 = []
    for alpha in range(window + 1):
        routed = [f for f in uses if f >= alpha]
        f1.append(2 * sum(routed) / (window * len(routed) + sum(uses)))
    assert segment_routing(trace, window).srp == pytest.approx(max(f1))


def test_sch_of_a_trace_worked_out_by_hand():
    """One slot, window 2, experts a b a b b: a is missed; at b both have one use to come, b was used last
    and stays; a is missed and b, with two uses to come, stays; b and b hit."""
    assert segment_cache_hit_rates(one_layer([0], [1], [0], [1], [1]), 2, [1]) == [pytest.approx(2 / 5)]


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5))
def test_sch_is_what_counting_ahead_gives(seed, window, size):
    trace = random_trace(seed)
    hits = 0
    for layer in range(2):
        residents, last_use = set(), {}
        for token in range(12):
            chosen = set(trace.experts[token, layer].tolist())
            hits += len(chosen & residents)
            residents |= chosen
            last_use |= dict.fromkeys(chosen, token)
            end = 7 if token < 7 else 12
            ahead = trace.experts[token + 1 : min(token + 1 + window, end), layer].reshape(-1).tolist()
            order = sorted(residents, key=lambda e: (ahead.count(e), last_use[e], e))
            residents -= set(order[: max(0, len(residents) - size)])
    assert segment_cache_hit_rates(trace, window, [size]) == [pytest.approx(hits / 48)]


def run(capsys, monkeypatch, *arguments):
    """Run the benchmark in one process; return exit code, stdout, the object of its last line, stderr."""
    monkeypatch.setattr(sys, "argv", ["cache_hit_rate.py", "--jobs", "1", *map(str, arguments)])
    code = cache_hit_rate.main()
    out, err = capsys.readouterr()
    return code, out, json.loads(out.splitlines()[-1]) if code == 0 else None, err


@pytest.fixture
def trace_file(tmp_path):
    trace = random_trace(3, seq_len=(40, 30), num_experts=8)
    write_trace(tmp_path / "toy.npz", trace)
    return tmp_path / "toy.npz"


class OwnPolicy(LruPolicy):
    """A policy of somebody's own, found by its import path."""

    name = "own"


class TrainedPolicy(LruPolicy):
    name = "trained"
    trained_on = sequence_digests(random_trace(3, seq_len=(40, 30), num_experts=8))[1:]


def test_the_report_has_a_row_for_every_trace_policy_and_size(capsys, monkeypatch, trace_file, tmp_path):
    own = f"{__name__}:OwnPolicy"
    code, out, result, _ = run(
        capsys, monkeypatch, "--trace", trace_file, "--slots", "1,3", "--policies", f"lfu,{own}",
        "--expert-bytes", "1000", "--csv", tmp_path / "r.csv", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0
    rows = result["results"]
    assert [(r["trace"], r["policy"], r["slots"]) for r in rows] == [
        ("toy", policy, slots) for policy in ("lfu", own) for slots in (1, 3)
    ]
    for row in rows:
        assert row["hits"] + row["misses"] == 70 * 2 * 2
        assert row["bytes_moved"] == 1000 * row["misses"]
        assert 0 <= row["hit_rate"] <= row["hit_rate"] + row["below_belady"] <= 1
        assert row["modelled_read_s_per_token"] == pytest.approx(row["misses"] * (1e-4 + 1000 / 2e9) / 70)
    assert [r["closed"] for r in rows if r["policy"] == own] == [0.0, 0.0]  # it is LRU
    assert {"machine", "commit", "seed"} <= set(result)
    assert "warning: 1 resident experts a layer is under one token's working set" in out
    assert "3 resident experts a layer is under" not in out
    assert "SRP m=4" in out and "SCH m=16" in out
    assert json.loads((tmp_path / "r.json").read_text()) == result
    with (tmp_path / "r.csv").open() as file:
        assert [float(row["hit_rate"]) for row in csv.DictReader(file)] == [r["hit_rate"] for r in rows]


@pytest.mark.parametrize("pool", ["layer", "shared"])
def test_every_policy_by_the_word_all_and_a_size_in_bytes(capsys, monkeypatch, trace_file, pool):
    code, _, result, _ = run(
        capsys, monkeypatch, "--trace", trace_file, "--bytes", "6000", "--expert-bytes", "1000",
        "--pool", pool, "--max-tokens", "50", "--no-statistics",
    )  # fmt: skip
    assert code == 0
    rates = {row["policy"]: row["hit_rate"] for row in result["results"]}
    assert {row["slots"] for row in result["results"]} == {3}
    assert {"lru", "ewma", "arc", "plec", "belady", "belady_no_bypass"} <= set(rates)
    assert max(rates.values()) == rates["belady"]


@pytest.mark.filterwarnings("error")
def test_processes_count_what_one_counts_and_find_policies_by_their_path(capsys, monkeypatch, trace_file):
    arguments = ("--trace", trace_file, "--slots", "2,3", "--policies", f"horizon,{__name__}:OwnPolicy")
    results = [
        run(capsys, monkeypatch, *arguments, "--no-statistics", "--jobs", jobs)[2]["results"]
        for jobs in (1, 2)
    ]
    timeless = [[{**row, "replay_s": 0} for row in rows] for rows in results]
    assert timeless[0] == timeless[1]


def test_a_policys_training_data_is_not_counted(capsys, monkeypatch, trace_file):
    code, out, result, _ = run(
        capsys, monkeypatch, "--trace", trace_file, "--slots", "3", "--policies", f"{__name__}:TrainedPolicy"
    )
    assert code == 0
    (row,) = result["results"]
    assert row["hit_rate"] is None and row["refused"].startswith("1 of its 2 sequences")
    assert "refused" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "nonsense"], "unknown"),
        (["--slots", "four"], "not a list of numbers"),
        (["--slots", "0"], "holds nothing"),
        (["--as-run"], "is no recorded run"),
        (["--policies", ""], "names none"),
        (["--csv", "no/such/folder.csv"], "there is no folder"),
        (["--json", "."], "is a folder"),
        (["--link-bytes-per-s", "0"], "must be above 0"),
        (["--latency-s", "-1"], "0 or more"),
        (["--max-tokens", "-3"], "at least 1"),
    ],
)
def test_what_cannot_be_replayed_is_refused(capsys, monkeypatch, trace_file, arguments, message):
    code, _, _, err = run(capsys, monkeypatch, "--trace", trace_file, *arguments)
    assert code == 2 and message in err


def test_times_are_modelled_on_a_device_profile(capsys, monkeypatch, trace_file):
    arguments = ("--trace", trace_file, "--policies", "lru", "--slots", "3", "--no-statistics")
    options = {
        "disk": ("--profile", "rtx-4060-laptop"),
        "link": ("--profile", "rtx-4060-laptop", "--tier", "link"),
    }
    seconds = {}
    for tier, option in options.items():
        _, _, result, _ = run(capsys, monkeypatch, *arguments, *option)
        assert result["profile"] == "rtx-4060-laptop"
        seconds[tier] = result["results"][0]["modelled_read_s_per_token"]
    assert seconds["disk"] > 3.5 * seconds["link"]  # 3.5 GB/s and a latency against 15.75 GB/s
    code, _, _, err = run(capsys, monkeypatch, *arguments, "--profile", "cpu-laptop-16gb", "--tier", "link")
    assert code == 2 and "has no link.to_device_bandwidth" in err


def test_without_matplotlib_it_says_so(capsys, monkeypatch, trace_file, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, _, err = run(
        capsys,
        monkeypatch,
        "--trace",
        trace_file,
        "--slots",
        "3",
        "--policies",
        "lru",
        "--plot",
        tmp_path / "p.png",
    )
    assert code == 0 and "matplotlib is not installed" in err


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_recorded_run_is_replayed_as_it_was(capsys, monkeypatch, tiny_moe, tmp_path, prefetch):
    tokenizer = moe_offload.load_tokenizer(tiny_moe)
    model = moe_offload.from_pretrained(tiny_moe, experts=12, policy="lru", prefetch=prefetch, context=64)
    with model.offload.trace() as recorder:
        model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    write_trace(tmp_path / "run.npz", recorder.trace())
    hits = model.offload.stats().hits
    model.offload.close()
    code, _, result, _ = run(capsys, monkeypatch, "--trace", tmp_path / "run.npz", "--as-run")
    assert code == 0 and result["same"] and result["results"][0]["hits"] == hits > 0
    assert read_trace(tmp_path / "run.npz").model == tiny_moe.name
