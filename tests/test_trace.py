"""Routing traces: what is written is read again, other engines' forms too, and damage is named."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import moe_offload
from moe_offload.cli import main
from moe_offload.cli_trace import read_prompts
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.trace import DECODE, PREFILL, make_trace, read_trace, write_trace

EXPERTS = np.array([[[3, 1], [0, 2]], [[1, 2], [2, 0]], [[5, 3], [0, 1]]])  # (3 tokens, 2 layers, top 2)
WEIGHTS = np.array([0.75, 0.25] * 6, np.float32).reshape(3, 2, 2)


def test_what_is_written_is_read_again(tmp_path):
    logits = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float16)
    trace = make_trace(
        EXPERTS,
        num_experts=8,
        weights=WEIGHTS,
        layers=[1, 3],
        seq_len=[2, 1],
        step_tokens=[2, 1],
        phase=np.array([PREFILL, PREFILL, DECODE]),
        model="toy",
        metadata={"policy": "lru"},
        router_logits=logits,
        router_inputs=logits[:, :, :5],
    )
    write_trace(tmp_path / "t.npz", trace)
    again = read_trace(tmp_path / "t.npz")
    assert (again.num_experts, again.layers, again.model) == (8, (1, 3), "toy")
    assert again.metadata == {"policy": "lru"}
    for name in ("experts", "weights", "seq_len", "step_tokens", "phase", "router_logits", "router_inputs"):
        assert np.array_equal(getattr(again, name), getattr(trace, name)), name
    assert again.experts.dtype == np.uint8 and again.weights.dtype == np.float32


def test_decode_only_leaves_prompts_out_and_keeps_sequences_apart():
    trace = make_trace(
        EXPERTS, weights=WEIGHTS, seq_len=[2, 1], phase=np.array([PREFILL, DECODE, DECODE])
    ).decode_only()
    assert np.array_equal(trace.experts, EXPERTS[1:])
    assert np.array_equal(trace.weights, WEIGHTS[1:])
    assert trace.seq_len.tolist() == [1, 1] and trace.step_tokens.tolist() == [1, 1]


def test_files_of_other_engines_are_read(tmp_path):
    """One routing in four forms; rows of csv and jsonl may come in any order."""
    np.save(tmp_path / "t.npy", EXPERTS)
    np.savez(tmp_path / "t.npz", experts=EXPERTS.astype(np.uint8), probs=WEIGHTS, seq_len=[1, 2])
    cells = [(t, layer) for layer in (0, 1) for t in (0, 1, 2)]
    rows = [",".join(map(str, [t, layer, *EXPERTS[t, layer]])) for t, layer in cells]
    (tmp_path / "t.csv").write_text("token,layer,e0,e1\n" + "\n".join(rows))
    items = [
        {
            "token": t,
            "layer": x,
            "experts": EXPERTS[t, x].tolist(),
            "weights": [0.75, 0.25],
            "sequence": t > 0,
        }
        for t, x in cells
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    for ending in ("npy", "npz", "csv", "jsonl"):
        trace = read_trace(tmp_path / f"t.{ending}", num_experts=32)
        assert np.array_equal(trace.experts, EXPERTS), ending
        assert trace.num_experts == 32
        assert trace.phase.tolist() == [DECODE] * 3
        assert trace.seq_len.tolist() == ([1, 2] if ending in ("npz", "jsonl") else [3]), ending
        if ending in ("npz", "jsonl"):
            assert np.array_equal(trace.weights, WEIGHTS)
    assert read_trace(tmp_path / "t.npy").num_experts == 6


def test_llama_cpps_tables_are_read_without_their_prompts(tmp_path):
    """A prompt of two tokens, whose last layer has but the last one, then the three tokens of EXPERTS."""
    decoded = [(t, layer, EXPERTS[t, layer]) for t in range(3) for layer in (0, 1)]
    tables = {
        "wide": ["pos,layer,id0,id1", "-2,0,4,5", "-1,0,3,5", "-1,1,3,5"]
        + [f"{t},{layer},{ids[0]},{ids[1]}" for t, layer, ids in decoded],
        "ranked": ["phase,token,layer,rank,expert", "prefill,0,0,0,4", "prefill,0,0,1,5"]
        + [f"decode,{t + 1},{layer},{r},{ids[r]}" for r in (1, 0) for t, layer, ids in decoded],
        "pairs": ["0,4", "0,5", "0,3", "0,5", "1,3", "1,5"]
        + [f"{layer},{expert_id}" for _, layer, ids in decoded for expert_id in ids],
    }
    for name, lines in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        trace = read_trace(tmp_path / f"{name}.csv")
        assert np.array_equal(trace.experts, EXPERTS), name
    (tmp_path / "pairs.csv").write_text("layer,expert\n" + "\n".join(tables["pairs"]))
    assert np.array_equal(read_trace(tmp_path / "pairs.csv").experts, EXPERTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.npz", b"PK\x03\x04 no archive", "cannot be read"),
        ("t.npy", b"", "cannot be read"),
        ("t.csv", b"token,layer,e0\n0,0,1\n1,0,x\n", "cannot be read"),
        ("t.csv", b"0,0,1,2\n0,1,1,2\n1,0,1,2\n", "rows lack"),
        ("t.csv", b"0,0,1,2\n1,0,1\n", "every row needs the same number"),
        ("t.csv", b"0,0,1,1\n", "chooses an expert twice"),
        ("t.csv", b"0,0,-1,1\n", "expert -1 is negative"),
        ("t.csv", b"", "no rows"),
        ("t.csv", b"0,0,1,2\n0,0,1,3\n", "has layer 0 twice"),
        ("t.csv", b"-1,0,1,2\n", "none was decoded"),
        ("t.csv", b"token,layer,rank,expert\n0,0,0\n", "cannot be read"),
        ("t.jsonl", b'{"token": 0}\n', "cannot be read"),
        ("t.jsonl", b"[1]\n", "not an object"),
    ],
)
def test_damage_is_a_checkpoint_error_that_names_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"t\.\w+.*{message}"):
        read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"experts": EXPERTS, "num_experts": 5}, "expert 5 of num_experts=5"),
        ({"experts": EXPERTS, "seq_len": [1, 1]}, "seq_len sums to 2, tokens 3"),
        ({"experts": EXPERTS, "step_tokens": [3, 0]}, "below 1"),
        ({"experts": EXPERTS, "weights": WEIGHTS[:2]}, "weights has shape"),
        ({"experts": EXPERTS, "weights": WEIGHTS * np.nan}, "not finite"),
        ({"experts": EXPERTS, "layers": [2, 1]}, "do not ascend"),
        ({"experts": EXPERTS.astype(float)}, "float64"),
        ({"experts": EXPERTS[0]}, "shape"),
        ({"weights": WEIGHTS}, "no array 'experts'"),
        ({"experts": EXPERTS, "router_logits": np.zeros((3, 2, 7))}, "router_logits has shape"),
    ],
)
def test_arrays_that_contradict_one_another_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(CheckpointError, match=message):
        read_trace(tmp_path / "t.npz")


def test_what_is_no_trace_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        read_trace(tmp_path / "missing.npz")
    with pytest.raises(ConfigError, match=r"ends in none of \.npz"):
        read_trace(tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(tmp_path / "no" / "t.npz", make_trace(EXPERTS))


def test_the_recorder_sees_every_step_and_stops_when_told(tiny_moe):
    tokenizer = moe_offload.load_tokenizer(tiny_moe)
    model = moe_offload.from_pretrained(tiny_moe, experts=8, prefetch=False, context=64)
    prompts = [
        tokenizer(text, return_tensors="pt").input_ids for text in ("abcdef", "one two three four five")
    ]

    def generate(prompt):
        return model.generate(
            prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )

    silent = generate(prompts[0]).sequences
    with model.offload.trace(router_logits=True, router_inputs=True) as recorder:
        with pytest.raises(ConfigError, match="no forward pass"):
            recorder.trace()
        with pytest.raises(ConfigError, match="recorded already"), model.offload.trace():
            pass
        for prompt in prompts:
            recorder.begin_sequence()
            recorded = generate(prompt).sequences
            silent = recorded if prompt is prompts[1] else silent
            assert (recorded == silent).all()
    generate(prompts[0])
    trace = recorder.trace()
    lengths = [prompt.shape[1] for prompt in prompts]
    assert trace.seq_len.tolist() == [length + 3 for length in lengths]
    assert trace.step_tokens.tolist() == [lengths[0], 1, 1, 1, lengths[1], 1, 1, 1]
    assert trace.phase.tolist() == [*[0] * lengths[0], 1, 1, 1, *[0] * lengths[1], 1, 1, 1]
    assert trace.experts.shape == (sum(lengths) + 6, 2, 2) and trace.num_experts == 8
    assert (np.diff(trace.weights, axis=2) <= 0).all()
    assert trace.router_inputs.shape[2] == 64
    chosen = np.take_along_axis(trace.router_logits, trace.experts.astype(np.int64), axis=2)
    assert (chosen.min(axis=2) >= np.sort(trace.router_logits, axis=2)[:, :, -2]).all()
    assert trace.metadata["policy"] == "horizon" and trace.metadata["plan"]["pools"]
    model.offload.close()
    with pytest.raises(ConfigError, match="closed"):
        model.offload.trace()


def test_the_command_writes_a_trace_of_every_prompt(tiny_moe, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "ab"}\n{"turns": ["cd", "later"]}\n"ef"\n')
    command = ["trace", "--model", str(tiny_moe), "--prompts", str(prompts), "-o", str(tmp_path / "t.npz")]
    assert main([*command, "--max-new-tokens", "3", "--raw", "--context", "32"]) == 0
    out = capsys.readouterr().out
    assert "3 sequences" in out
    assert re.search(r"hit rate 0\.\d+ \(policy horizon\); .* at most 0\.\d+ \(Belady\)", out)
    trace = read_trace(tmp_path / "t.npz")
    assert len(trace.seq_len) == 3 and trace.router_logits is None


def test_prompts_end_with_lines_and_not_at_other_separators(tmp_path):
    """JSON may hold U+2028 as it is; files of Windows begin with a mark and end lines in two characters."""
    prompts = ["a\u2028b\x85c", "d"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "p.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_prompts(tmp_path / "p.jsonl") == prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "token,layer,expert\r\n0,0,3\r\n0,0,1\r\n"),
        ("t.jsonl", '{"token": 0, "layer": 0, "experts": [3, 1]}\r\n'),
    ],
)
def test_a_trace_may_begin_with_a_byte_order_mark(tmp_path, name, text):
    (tmp_path / name).write_bytes(("\ufeff" + text).encode())
    assert read_trace(tmp_path / name).experts.tolist() == [[[3, 1]]]


def test_a_prompt_beyond_the_context_is_refused_before_the_first_is_answered(tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("short\n" + "long " * 200)
    monkeypatch.setattr("moe_offload.runtime.generate.run", lambda *args, **kwargs: pytest.fail("it began"))
    command = ["trace", "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "t.npz")]
    assert main([*command, "--context", "64", "--max-new-tokens", "4"]) == 2
    assert "leaves no room for an answer in the context of 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "output", "message"),
    [
        ("", "t.npz", "holds no prompt"),
        ('{"question": 1}', "t.npz", "no object"),
        ("{", "t.npz", "one prompt per line"),
        ('"x"', "t.csv", "ends in .npz"),
        ('"x"', "no/t.npz", "no folder"),
    ],
)
def test_the_command_refuses_bad_files_before_it_loads(tmp_path, capsys, prompts, output, message):
    (tmp_path / "p.jsonl").write_text(prompts)
    code = main(["trace", "--prompts", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / output)])
    assert code == 2
    assert message in capsys.readouterr().err
