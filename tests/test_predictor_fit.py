"""Fitting predictors: closed forms against their definitions, files, and the way through a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_models import save_toy_model

import moe_offload
from moe_offload.cli import main
from moe_offload.cli_fit_predictor import make_fitter, report
from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.predictors.evaluate import Evaluation, evaluate
from moe_offload.predictors.fit_file import PredictorFit, read_fit, write_fit
from moe_offload.predictors.fit_hybrid import HybridRegression
from moe_offload.predictors.learned import export_onnx, open_session
from moe_offload.predictors.regression import SharedRegression, fit_curve, low_rank, ridge
from moe_offload.predictors.routers import probabilities
from moe_offload.runtime import fit_recording
from moe_offload.runtime.predictor_choice import (
    GROUPS,
    PredictorChoice,
    choose_predictor,
    fit_path,
)
from moe_offload.runtime.predictor_making import make_predictor
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import checkpoint_key

FAMILY = "qwen2_moe"  # a dense first layer, a shared expert


class LetterTokenizer:
    """One token per character."""

    def __call__(self, text: str, return_tensors: str) -> LetterTokenizer:
        self.input_ids = torch.tensor([[3 + ord(letter) % 90 for letter in text]])
        return self


def make_documents(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    words = ["abc ", "hello ", "routing ", "of ", "the ", "moon ", "xyz; ", "42 "]
    return ["".join(generator.choice(words, 200)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy_model(FAMILY, tmp_path_factory.mktemp(FAMILY))


@pytest.fixture(scope="module")
def model(folder):
    loaded = moe_offload.from_pretrained(folder, ram="8GiB", experts="all", context=512, prefetch=False)
    yield loaded
    loaded.offload.close()


@pytest.fixture(scope="module")
def recording(model):
    return fit_recording.record(model, LetterTokenizer(), make_documents(12), 1500, window_tokens=128)


@pytest.fixture(scope="module")
def fit(model, folder, recording):
    pytest.importorskip("onnx")
    fitter = make_fitter(model, recording, 2, checkpoint_key(open_checkpoint(folder)))
    fitter.counts()
    fitter.gates()
    fitter.low_rank()
    fitter.hybrid()
    fitter.network(hidden_units=8)
    return fitter.fit


def test_ridge_goes_from_the_prior_to_least_squares():
    generator = np.random.default_rng(1)
    features, truth, prior = (generator.normal(size=size) for size in ((200, 6), (6, 3), (6, 3)))
    features, truth, prior = (array.astype(np.float32) for array in (features, truth, prior))
    targets = features @ truth
    np.testing.assert_allclose(ridge(features, targets, 1e-7, prior), truth, atol=1e-3)
    np.testing.assert_allclose(ridge(features, targets, 1e6, prior), prior, atol=1e-3)


def test_regressions_that_share_features_are_ridge_regressions():
    generator = np.random.default_rng(5)
    shared, more, targets = (generator.normal(size=(60, n)).astype(np.float32) for n in (4, 2, 3))
    found = SharedRegression(shared).tables(more, targets, (1e-3, 0.5))
    for strength, table in zip((1e-3, 0.5), found, strict=True):
        wanted = ridge(np.concatenate([shared, more], axis=1), targets, strength)
        np.testing.assert_allclose(table, wanted, rtol=1e-3, atol=1e-5)


def test_the_hybrid_finds_each_experts_own_matrix():
    """Later scores are what the chosen experts' matrices make of the input: no linear function of it."""
    generator = np.random.default_rng(6)
    num_experts, hidden_size, num_tokens = 4, 6, 900
    inputs = generator.normal(size=(num_tokens, hidden_size)).astype(np.float32)
    choice = np.zeros((num_tokens, num_experts), np.float32)
    chosen = generator.integers(0, num_experts, num_tokens)
    choice[np.arange(num_tokens), chosen] = generator.uniform(0.3, 1.0, num_tokens)
    matrices = generator.normal(size=(num_experts, hidden_size, num_experts)).astype(np.float32)
    weights = choice[np.arange(num_tokens), chosen]
    targets = weights[:, None] * np.einsum("th,thj->tj", inputs, matrices[chosen])
    seen = np.concatenate([inputs, choice, np.ones((num_tokens, 1), np.float32)], axis=1)
    past = generator.normal(size=(num_tokens, 2 * num_experts)).astype(np.float32)
    regression = HybridRegression(seen, hidden_size, num_experts, num_fitted=600)
    (found,) = regression.fits(past, targets, None, (1e-6,))
    np.testing.assert_allclose(
        regression.directions @ regression.directions.T, np.eye(hidden_size), atol=1e-5
    )
    for expert_id in range(num_experts):
        answers = regression.directions.T @ found.answers[expert_id]
        np.testing.assert_allclose(answers, matrices[expert_id], atol=2e-2)
    np.testing.assert_allclose(regression.scores(found, past)[600:], targets[600:], atol=2e-2)


def test_a_fit_made_before_experts_had_matrices_still_loads_and_one_that_contradicts_itself_does_not(
    fit, folder, tmp_path
):
    path = tmp_path / "fit.npz"
    groups = {name: group for name, group in fit.groups.items() if name not in ("answers", "directions")}
    older = PredictorFit(
        fit.checkpoint, fit.layers, fit.num_experts, fit.top_k, fit.hidden_size, fit.depth, groups
    )
    write_fit(path, older)
    chosen = choose_predictor(f"hybrid={path}", open_checkpoint(folder))
    assert "answers" not in chosen.fit.groups
    pair, answers = next(iter(fit.groups["answers"].items()))
    for wrong in (answers[:-1], answers[:, :-1], np.full_like(answers, np.nan)):
        older.groups = dict(fit.groups, answers={pair: wrong})
        write_fit(path, older)
        with pytest.raises(CheckpointError, match="do not fit"):
            read_fit(path)
    older.groups = dict(groups, answers=fit.groups["answers"])
    write_fit(path, older)
    with pytest.raises(CheckpointError, match="do not fit"):
        read_fit(path)


def test_a_low_rank_map_finds_one_that_exists():
    generator = np.random.default_rng(2)
    features = generator.normal(size=(300, 8)).astype(np.float32)
    targets = features @ generator.normal(size=(8, 2)) @ generator.normal(size=(2, 8)) + 1.5
    down, up, shift = low_rank(features, targets.astype(np.float32), 1e-7, rank=2)
    assert down.shape == (8, 2) and up.shape == (2, 8)
    np.testing.assert_allclose(features @ down @ up + shift, targets, atol=1e-2)


def test_a_fitted_curve_says_how_often_it_is_right():
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(4000, 8)).astype(np.float32)
    truth = scores + generator.normal(size=scores.shape) * 0.7
    used = (truth >= np.sort(truth, axis=1)[:, -2:-1]).astype(np.float32)
    chances = probabilities(scores, 2, fit_curve(scores, used, 2))
    evaluation = Evaluation({0: used.astype(bool)}, {(1, 0): chances})
    assert evaluation.calibration_error(1) < 0.03
    assert Evaluation({0: used.astype(bool)}, {(1, 0): probabilities(scores, 2)}).calibration_error(1) > 0.06


def test_recall_and_over_fetch_by_hand():
    used = np.array([[1, 0, 1, 0], [0, 1, 1, 0]], bool)
    chances = np.array([[0.9, 0.1, 0.2, 0.6], [0.1, 0.7, 0.8, 0.0]], np.float32)
    evaluation = Evaluation({0: used}, {(1, 0): chances})
    assert evaluation.recall(1, 2) == 3 / 4
    assert evaluation.recall(1, 3) == 1.0
    missed = np.array([[[0, 0, 1, 0]], [[0, 1, 0, 0]]], bool)
    assert evaluation.recall(1, 2, among=missed) == 1 / 2  # two were not there, one of them guessed
    assert evaluation.recall(1, 2, among=np.zeros_like(missed)) is None
    assert evaluation.guesses_for(1, 0.75) == 3 / 2  # at a threshold above .6
    assert evaluation.guesses_for(1, 1.0) == 5 / 2
    assert evaluation.recall(2, 2) is None and evaluation.calibration_error(2) is None


def test_the_onnx_file_computes_the_network():
    pytest.importorskip("onnxruntime")
    generator = np.random.default_rng(4)
    linear, hidden, output, x = (
        generator.normal(size=size).astype(np.float32) for size in ((5, 3), (5, 4), (4, 3), (2, 5))
    )
    session = open_session(export_onnx(linear, hidden, output, num_features=5))
    inner = x @ hidden
    wanted = x @ linear + (inner / (1 + np.exp(-inner))) @ output
    np.testing.assert_allclose(session.run(None, {"features": x})[0], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="network cannot be read"):
        open_session(b"no network")


def test_a_recording_holds_what_the_routers_saw(model, recording):
    row = 1
    router = model.get_decoder().layers[recording.layers[row]].mlp.gate
    inputs = torch.from_numpy(recording.router_inputs[:, row]).float()
    with torch.no_grad():
        chosen = np.sort(router(inputs)[2].numpy(), axis=1)
    same = (chosen == np.sort(recording.experts[:, row], axis=1)).all(axis=1)
    assert same.mean() > 0.97  # inputs are kept in float16
    assert recording.num_tokens == recording.seq_len.sum() == len(recording.token_ids)
    assert set(recording.residual_rms) == set(recording.layers)


@pytest.mark.parametrize("name", GROUPS)
def test_every_predictor_runs_from_a_fit(name, model, fit, recording):
    if name == "learned":
        pytest.importorskip("onnxruntime")
    predictor = make_predictor(PredictorChoice(name, fit), model, list(fit.layers), depth=2)
    held_out = fit_recording.record(model, LetterTokenizer(), make_documents(13)[12:], 120, window_tokens=60)
    evaluation = evaluate(predictor, held_out, fit.num_experts)
    for chances in evaluation.chances.values():
        assert ((chances >= 0) & (chances <= 1)).all()
    assert {(1, 1)} <= set(evaluation.chances)
    if name in ("static", "transition", "mean_output_gate", "low_rank_gate", "hybrid", "learned"):
        assert evaluation.recall(1, fit.top_k) > fit.top_k / fit.num_experts  # better than by chance


def test_a_forecast_costs_what_the_call_takes_that_decoding_makes(model, fit, recording):
    predictor = make_predictor(PredictorChoice("hybrid", fit), model, list(fit.layers), depth=2)

    class Counting:
        asked: list[int] = []  # noqa: RUF012

        def likely(self, layer_idx, *known):
            self.asked.append(layer_idx)
            return native.likely(layer_idx, *known)

    native, predictor.one_token = predictor.one_token, Counting()
    evaluation = evaluate(predictor, recording, fit.num_experts)
    assert len(evaluation.predict_s) == len(Counting.asked) == recording.num_tokens * (len(fit.layers) - 1)
    predictor.one_token = None  # as the network's: decoding calls predict
    assert len(evaluate(predictor, recording, fit.num_experts).predict_s) == len(Counting.asked)


def test_what_was_fitted_beats_gate_reuse_on_other_documents(model, fit):
    """Random weights: little is carried from layer to layer but what a regression finds."""
    held_out = fit_recording.record(model, LetterTokenizer(), make_documents(14)[12:], 300, window_tokens=100)
    recall = {}
    for name in ("cross_layer_gate", "low_rank_gate", "hybrid"):
        predictor = make_predictor(PredictorChoice(name, fit), model, list(fit.layers), depth=2)
        recall[name] = evaluate(predictor, held_out, fit.num_experts).recall(1, fit.top_k)
    assert recall["hybrid"] > recall["cross_layer_gate"]
    assert recall["low_rank_gate"] > recall["cross_layer_gate"]


def test_a_fit_is_kept_for_its_checkpoint_and_used_by_default(
    model, fit, folder, recording, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = open_checkpoint(folder)
    assert choose_predictor("auto", checkpoint).name == "cross_layer_gate"
    with pytest.raises(ConfigError, match="fit-predictor makes it"):
        choose_predictor("fitted", checkpoint)
    report(model, fit, recording, 1.0)  # experts of a byte: no prediction is worth its time
    write_fit(fit_path(checkpoint), fit)
    assert choose_predictor("fitted", checkpoint).name == fit.report["best"]
    report(model, fit, recording, 1e9)
    write_fit(fit_path(checkpoint), fit)
    chosen = choose_predictor("auto", checkpoint)
    assert chosen.name in (fit.report["best"], "cross_layer_gate")  # which, is for what was measured
    chosen = choose_predictor("fitted", checkpoint)
    assert chosen.name == fit.report["best"] and chosen.name in ("hybrid", "learned")
    assert set(chosen.fit.groups) <= {*GROUPS[chosen.name], f"curve.{chosen.name}", "stay"}
    for group, arrays in chosen.fit.groups.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, fit.groups[group][key])
    prompt = torch.tensor([[11, 12, 13, 14]])
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(prompt, **arguments)
    for name in ("auto", f"hybrid={fit_path(checkpoint)}"):
        other = moe_offload.from_pretrained(folder, ram="8GiB", experts="30%", context=64, predictor=name)
        assert torch.equal(other.generate(prompt, **arguments), wanted)
        other.offload.close()


def test_a_fit_of_another_checkpoint_or_a_damaged_one_is_refused(fit, folder, tmp_path):
    checkpoint, path = open_checkpoint(folder), tmp_path / "fit.npz"
    other = PredictorFit("another-0123", fit.layers, fit.num_experts, fit.top_k, fit.hidden_size, fit.depth)
    other.groups = fit.groups
    write_fit(path, other)
    with pytest.raises(ConfigError, match="was fitted to another-0123"):
        choose_predictor(f"hybrid={path}", checkpoint)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="damaged"):
        choose_predictor(f"hybrid={path}", checkpoint)
    wrong = dict(fit.groups, hybrid={(1, 2): np.zeros((3, 3), np.float32)})
    other.groups = wrong
    write_fit(path, other)
    with pytest.raises(CheckpointError, match="shape"):
        read_fit(path)
    with pytest.raises(ConfigError, match="File exists; set XDG_CACHE_HOME"):
        write_fit(path / "below-a-file.npz", other)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gate", "known are"), ("no.module:Class", "cannot be made"), ("torch:nn", "cannot be made")],
)
def test_a_predictor_that_does_not_exist_is_named(name, message, folder):
    with pytest.raises(ConfigError, match=message):
        moe_offload.from_pretrained(folder, ram="8GiB", predictor=name, context=64)


def test_a_predictor_loads_by_import_path(folder):
    name = "moe_offload.predictors.cross_layer_gate:CrossLayerGate"
    model = moe_offload.from_pretrained(folder, ram="8GiB", predictor=name, context=64)
    assert model.offload.prefetcher.enabled
    model.offload.close()


def test_the_key_follows_the_weights_and_not_the_place(folder, tmp_path):
    copy = tmp_path / folder.name
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert checkpoint_key(open_checkpoint(copy)) == checkpoint_key(open_checkpoint(folder))
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint_key(open_checkpoint(copy)) != checkpoint_key(open_checkpoint(folder))


def test_documents_are_split_and_never_shared(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(make_documents(20)))
    documents = fit_recording.read_documents([path])
    fitted, held_out = fit_recording.split_documents(documents, 0.2, seed=0)
    assert len(fitted) == 16 and len(held_out) == 4 and not set(fitted) & set(held_out)
    path.write_text("too short")
    with pytest.raises(ConfigError, match="at least 8"):
        fit_recording.read_documents([path])


def test_the_command_fits_reports_and_keeps(tiny_moe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(make_documents(12)))
    arguments = ["fit-predictor", "--model", str(tiny_moe), "--text", str(text)]
    assert main([*arguments, "--tokens", "1200", "--depth", "1", "--no-network"]) == 0
    output = capsys.readouterr().out
    kept = fit_path(open_checkpoint(tiny_moe))
    assert kept.is_file() and str(kept) in output and "the best is hybrid" in output
    assert choose_predictor("fitted", open_checkpoint(tiny_moe)).name == "hybrid"
    held_out = read_fit(kept, ()).report["held_out"]
    assert held_out["hybrid"]["ahead"]["1"]["recall"] > held_out["cross_layer_gate"]["ahead"]["1"]["recall"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "5"], "from 1 to 4 layers"),
        (["--tokens", "10"], "at least 1000"),
        (["-o", "fit.bin"], "ends in .npz"),
    ],
)
def test_the_command_refuses_what_cannot_work_before_it_loads_anything(flags, message, tmp_path, capsys):
    assert main(["fit-predictor", "--text", str(tmp_path / "none.txt"), *flags]) == 2
    assert message in capsys.readouterr().err
