"""bench/make_synthetic.py: files of the asked size that any GGUF reader and llama.cpp can use."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import make_synthetic  # noqa: E402
import synthetic_routing as routing  # noqa: E402

from moe_offload.trace import make_trace, write_trace  # noqa: E402

MIXES = sorted(make_synthetic.MIXES)


@pytest.fixture(scope="module", params=MIXES)
def toy(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "made" / "by it" / f"{request.param}.gguf"
    command = [sys.executable, str(BENCH / "make_synthetic.py"), "--like", "toy", "--mix", request.param]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=60)
    return out


def test_every_weight_is_finite_and_has_the_spread_of_a_trained_model(toy):
    for tensor in gguf.GGUFReader(toy).tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(weights).all(), tensor.name
        if tensor.name == "token_embd.weight":
            assert abs(weights.std() / make_synthetic.EMBEDDING_SPREAD - 1) < 0.05
        elif tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            spread = weights.std() * np.sqrt(weights.shape[-1])
            assert 0.9 < spread < 1.1, f"{tensor.name}: {spread}"


def test_experts_differ_from_one_another(toy):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(toy).tensors}
    experts = tensors["blk.1.ffn_down_exps.weight"].data
    assert len({expert.tobytes() for expert in experts}) == len(experts) == 8


def test_llama_cpp_loads_it_and_its_logits_are_finite(toy):
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(toy), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    token_ids = llama.tokenize("the naïve thing".encode(), add_bos=False)
    llama.eval(token_ids)
    logits = llama.scores[: len(token_ids)]
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    assert llama.detokenize(token_ids).decode() == "the naïve thing"


def routed_alike(tokens, embedding, router, chosen):
    """Return the share of ``chosen`` experts (tokens, top_k) that a router takes on the bare embedding."""
    logits = embedding[tokens] @ router.T
    best = np.argsort(-logits, axis=1)[:, : chosen.shape[1]]
    return float((best[:, :, None] == chosen[:, None, :]).any(axis=1).mean())


@pytest.mark.parametrize("make", [routing.zipf_markov, routing.independent])
def test_routers_choose_what_the_process_says(make):
    experts = make(6, 32, 4, 3)
    embedding = routing.embedding_rows(experts, 32, 1024, 3, 1.0)
    tokens = np.arange(500)
    for layer_idx in range(6):
        router = routing.router_rows(layer_idx, 32, 1024, 3)
        assert routed_alike(tokens, embedding, router, experts[:500, layer_idx]) > 0.95


def test_every_token_chooses_top_k_different_experts():
    for experts in (routing.zipf_markov(3, 16, 5, 0), routing.independent(3, 16, 5, 0)):
        assert (np.diff(np.sort(experts, axis=2), axis=2) > 0).all()
        assert experts.min() >= 0 and experts.max() < 16


def test_the_chain_reuses_experts_and_the_independent_choices_do_not():
    assert routing.adjacent_reuse(routing.zipf_markov(4, 128, 8, 0)) > 0.4
    assert abs(routing.adjacent_reuse(routing.independent(4, 128, 8, 0)) - 8 / 128) < 0.01


def test_a_recorded_trace_is_followed_token_by_token(tmp_path):
    recorded = np.random.default_rng(0).permuted(np.tile(np.arange(8), (50, 3, 1)), axis=2)[:, :, :2]
    write_trace(tmp_path / "t.npz", make_trace(recorded.astype(np.int64), num_experts=8))
    experts = routing.from_trace(tmp_path / "t.npz", 4, 8, 2)
    assert np.array_equal(experts[:50, :3], recorded)
    assert np.array_equal(experts[50:100, 3], recorded[:, 0])  # tokens and layers begin again
    with pytest.raises(SystemExit, match="--top-k 2 --num-experts 8"):
        routing.from_trace(tmp_path / "t.npz", 4, 8, 3)


@pytest.mark.parametrize("vocab_size", [5000, 8300])
def test_tokens_beyond_the_process_repeat_its_rows(vocab_size):
    shape = make_synthetic.replace(make_synthetic.SHAPES["toy"], vocab_size=vocab_size)
    tensor = make_synthetic.list_tensors(shape, "q4_k_m")[0]
    assert (tensor.name, tensor.type) == ("token_embd.weight", gguf.GGMLQuantizationType.Q8_0)
    experts = routing.zipf_markov(2, 8, 2, 0)
    pieces = make_synthetic.embedding_pieces(tensor, experts, shape, 0)
    rows = np.frombuffer(b"".join(pieces), np.uint8).reshape(vocab_size, -1)
    assert np.array_equal(rows, rows[np.arange(vocab_size) % 4096])
    assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("mix", MIXES)
def test_size_gib_gives_the_fewest_layers_that_reach_the_size(mix, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"x --like small --size-gib 1.5 --mix {mix} --out x".split())
    shape = make_synthetic.chosen_shape(make_synthetic.parse_args())
    fewer = make_synthetic.replace(shape, num_hidden_layers=shape.num_hidden_layers - 1)
    sizes = [sum(t.num_bytes for t in make_synthetic.list_tensors(s, mix)) for s in (fewer, shape)]
    assert sizes[0] < 1.5 * 2**30 <= sizes[1]
