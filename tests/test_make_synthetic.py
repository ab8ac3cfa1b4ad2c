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

MIXES = sorted(make_synthetic.MIXES)


@pytest.fixture(scope="module", params=MIXES)
def toy(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / f"{request.param}.gguf"
    command = [sys.executable, str(BENCH / "make_synthetic.py"), "--like", "toy", "--mix", request.param]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=60)
    return out


def test_every_weight_is_finite_and_has_the_spread_of_a_trained_model(toy):
    for tensor in gguf.GGUFReader(toy).tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(weights).all(), tensor.name
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
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


def test_some_experts_are_chosen_much_more_often_than_others():
    router = make_synthetic.Tensor("blk.0.ffn_gate_inp.weight", (64, 512), gguf.GGMLQuantizationType.F32)
    rng = np.random.default_rng(0)
    rows = make_synthetic.float_tensor(router, rng)
    logits = rng.standard_normal((2000, 512)) @ rows.T
    counts = np.sort(np.bincount(np.argsort(-logits)[:, :8].ravel(), minlength=64))[::-1]
    assert counts[:16].sum() > 0.4 * counts.sum()  # a quarter of the experts; 0.25 if all were alike


@pytest.mark.parametrize("mix", MIXES)
def test_size_gib_gives_the_fewest_layers_that_reach_the_size(mix, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"x --like small --size-gib 1.5 --mix {mix} --out x".split())
    shape = make_synthetic.chosen_shape(make_synthetic.parse_args())
    fewer = make_synthetic.replace(shape, num_hidden_layers=shape.num_hidden_layers - 1)
    sizes = [sum(t.num_bytes for t in make_synthetic.list_tensors(s, mix)) for s in (fewer, shape)]
    assert sizes[0] < 1.5 * 2**30 <= sizes[1]
