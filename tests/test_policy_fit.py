"""The policy's coefficients that fit-predictor keeps for a checkpoint, and who uses them."""

from __future__ import annotations

import numpy as np
import pytest
from test_horizon import markov_trace

import moe_offload
from moe_offload.errors import ConfigError
from moe_offload.planning.policies.horizon import RATES, HorizonFit
from moe_offload.predictors.fit import Recording
from moe_offload.residency.policy_fit import automatic_policy, policy_fit_path
from moe_offload.runtime.policy_fitting import fit_policy, keep_if_better
from moe_offload.storage.checkpoint import open_checkpoint


def recording_of(trace):
    tokens, layers, _ = trace.experts.shape
    return Recording(
        layers=trace.layers,
        router_inputs=np.zeros((tokens, layers, 1), np.float16),
        experts=trace.experts.astype(np.int64),
        weights=np.full(trace.experts.shape, 0.5, np.float32),
        seq_len=trace.seq_len.astype(np.int64),
        token_ids=np.zeros(tokens, np.int64),
        embeddings=None,
        residual_rms={},
    )


def any_fit(checkpoint):
    layers, num_experts = checkpoint.spec.moe_layers, checkpoint.spec.num_experts
    generator = np.random.default_rng(0)
    return HorizonFit(
        tuple(layers),
        generator.normal(size=(len(layers), num_experts, len(RATES), num_experts)).astype(np.float32),
        generator.normal(size=(len(layers), 1, num_experts, num_experts)).astype(np.float32),
        np.zeros((len(layers), num_experts), np.float32),
        (),
    )


def test_a_fit_is_kept_where_it_finds_more_on_other_text_and_only_there(tmp_path):
    path = tmp_path / "policies" / "toy.npz"
    learned, held_out = recording_of(markov_trace(0, 400)), recording_of(markov_trace(1, 400))
    report = keep_if_better(fit_policy(learned, 6), held_out, 6, path)
    assert report.is_better and path.is_file() and report.residents == 1
    assert report.closed("lru") == 0.0 and report.closed("belady") == 1.0
    assert report.closed("horizon, fitted") > report.closed("horizon")
    path.unlink()
    fit = fit_policy(learned, 6)
    upside_down = HorizonFit(fit.layers, -fit.own, -fit.before, -fit.constant, fit.trained_on)
    assert not keep_if_better(upside_down, held_out, 6, path).is_better
    assert list(path.parent.iterdir()) == []


def test_where_a_fit_cannot_be_written_the_remedy_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    fit, held_out = fit_policy(recording_of(markov_trace(0, 60)), 6), recording_of(markov_trace(1, 60))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME to another folder or pass -o"):
        keep_if_better(fit, held_out, 6, tmp_path / "file" / "toy.npz")


def test_the_default_policy_takes_this_checkpoints_fit_and_the_tokens_stay(tiny_moe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = open_checkpoint(tiny_moe)
    path = policy_fit_path(checkpoint)
    assert automatic_policy("auto", checkpoint) == automatic_policy("horizon", checkpoint) == "horizon"
    path.parent.mkdir(parents=True)
    any_fit(checkpoint).write(path)
    prompt = moe_offload.load_tokenizer(tiny_moe)("abc", return_tensors="pt").input_ids
    used, tokens = [], []
    for policy in (None, "auto", "horizon", "lru"):
        model = moe_offload.from_pretrained(tiny_moe, policy=policy, experts="25%", context=64)
        used.append(model.offload.stats().policy)
        tokens.append(model.generate(prompt, max_new_tokens=8, do_sample=False).tolist())
        model.offload.close()
    assert used == [f"horizon={path}", f"horizon={path}", "horizon", "lru"]
    assert all(ids == tokens[0] for ids in tokens)
