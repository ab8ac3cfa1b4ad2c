"""``quant=``: the blocks are gguf-py's, every family loads, and no run trusts what another left half done."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_models import FAMILIES, OTHER_FAMILIES, TOY_CONFIGS, plain_model, save_toy_model

import moe_offload
from moe_offload import BudgetError, CheckpointError, ConfigError
from moe_offload.cli import main
from moe_offload.runtime import quantized
from moe_offload.storage import quantize, quantize_file, quantize_rules
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.checkpoint_key import cache_folder
from moe_offload.storage.expert_format import GgmlType
from moe_offload.storage.quantize import quantize_once
from moe_offload.storage.quantize_plan import plan_quantization

CHILD = Path(__file__).parent / "quantize_child.py"
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 40, 41, 42]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder("quantized")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy_model("qwen3_moe", tmp_path_factory.mktemp("toy"), moe_intermediate_size=32)


def experts_plan(folder, quant="q8_0"):
    return plan_quantization(open_checkpoint(folder), quant, {})


def quantize_silently(plan):
    lines = []
    return quantize_once(plan, say=lines.append), lines


@contextmanager
def loaded(folder, **options):
    model = moe_offload.from_pretrained(folder, **{"ram": "8GiB", "context": 64, **options})
    try:
        yield model
    finally:
        model.offload.close()


# --- the numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_0"])
def test_blocks_are_those_of_gguf_py(dtype, kind):
    values = torch.randn(33, 96, dtype=torch.float32).mul(0.1).to(dtype)
    values[3] = 0.0
    values[4, 5] = 60_000.0
    raw = values.view(torch.uint8).numpy().reshape(-1)
    source = {torch.float32: GgmlType.F32, torch.bfloat16: GgmlType.BF16, torch.float16: GgmlType.F16}[dtype]
    blocks = quantize_rules.quantize_rows(
        quantize_rules.float_values(raw, source).reshape(33, 96), GgmlType[kind]
    )
    wanted = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(blocks, wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # a tensor per expert; stacked and transposed
def test_the_file_holds_every_expert_quantized_by_gguf_py(tmp_path, monkeypatch, family):
    monkeypatch.setattr(quantize_file, "SLICE_ELEMENTS", 900)  # matrices in several slices, the last short
    sizes = {"intermediate_size": 32} if family == "gpt_oss" else {"moe_intermediate_size": 32}
    folder = save_toy_model(family, tmp_path / "toy", torch.bfloat16, **sizes)
    checkpoint, _ = quantize_silently(experts_plan(folder, "q4_0"))
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(checkpoint.files[-1]).tensors}
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    if family == "gpt_oss":
        prefix = "model.layers.2.mlp.experts"
        wanted = {
            "gate_up": weights[f"{prefix}.gate_up_proj"].transpose(0, 2, 1),
            "down": weights[f"{prefix}.down_proj"].transpose(0, 2, 1),
        }
    else:
        prefix = "model.layers.2.mlp.experts"
        wanted = {
            name: np.stack([weights[f"{prefix}.{expert_id}.{name}_proj.weight"] for expert_id in range(8)])
            for name in ("gate", "up", "down")
        }
    for name, values in wanted.items():
        blocks = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType.Q4_0)
        np.testing.assert_array_equal(stored[f"layers.2.experts.{name}"], blocks)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_every_family_computes_with_the_quantized_weights(tmp_path, family):
    """Against plain transformers on gguf-py's own dequantized weights.

    All experts are used, or routing that flips would be measured. What remains is that activations
    are rounded to 8 bits: small beside what 4 bits do to the weights, so that a matrix left out,
    mixed up or quantized along the wrong axis is seen. (A gated delta net amplifies either: toy
    qwen3_next and qwen3_5_moe lose 68% and 84% of their logits to 4 bits, in plain transformers, too.)
    """
    folder = save_toy_model(family, tmp_path / "toy", **_every_expert(family))
    plain = plain_model(folder)
    with torch.no_grad():
        exact = plain(PROMPT).logits
        _round_weights(plain)
        rounded = plain(PROMPT).logits
    with loaded(folder, quant="q4_0") as model:
        actual = model(PROMPT).logits
    assert (actual - rounded).norm() < 0.25 * (exact - rounded).norm()


def _every_expert(family):
    """The configuration under which a token uses all experts."""
    values = TOY_CONFIGS[family][1]
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    num_experts = next(values[name] for name in counts if name in values)
    names = {"num_experts_per_tok"} | ({"top_k_experts", "moe_k"} & values.keys())
    groups = {"topk_group": values["n_group"]} if "n_group" in values else {}
    return {**dict.fromkeys(names, num_experts), **groups}


def _round_weights(model):
    """Send every matrix that q4_0 changes through gguf-py and back."""
    head = model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parameter.ndim < 2 or {"gate", "router"} & set(parts) or "bias" in name:
            continue
        kind = "Q8_0" if parameter is head else "Q4_0"
        swap = "experts" in parts and getattr(model.config, "model_type", "") == "gpt_oss"
        values = parameter.data.transpose(-1, -2) if swap else parameter.data
        if values.shape[-1] % 32 == 0:
            rounded = _there_and_back(values.contiguous().numpy(), gguf.GGMLQuantizationType[kind])
            parameter.data = rounded.transpose(-1, -2).contiguous() if swap else rounded


def _there_and_back(values, kind):
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind))


def test_routers_norms_and_odd_matrices_stay_as_they_are(tmp_path):
    folder = save_toy_model("qwen3_moe_with_dense_layers", tmp_path / "toy")
    with loaded(folder, quant="q8_0") as model:
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32
        assert kinds["model.layers.1.self_attn.q_proj"] == "QuantLinear"
        assert kinds["model.layers.0.mlp.gate_proj"] == "QuantLinear"
        assert kinds["model.layers.0.mlp.down_proj"] == "Linear"  # rows of 40 are no whole blocks
        assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, in packed form
        assert kinds["lm_head"] == "QuantLinear"


def test_the_budget_changes_no_bit_of_a_quantized_model(folder):
    with loaded(folder, quant="q4_0") as whole, loaded(folder, quant="q4_0", experts=4) as small:
        assert torch.equal(whole(PROMPT).logits, small(PROMPT).logits)


def test_four_bits_take_a_quarter_of_sixteen(tmp_path):
    folder = save_toy_model("mixtral", tmp_path / "toy", torch.bfloat16, intermediate_size=64)
    plan = experts_plan(folder, "q4_0")
    assert plan.num_bytes * 32 == plan.source_bytes * 9  # 18 bytes instead of 64 for 32 weights


def test_the_rules_fall_back_where_rows_do_not_divide():
    kind = quantize_rules.matrix_type
    assert kind("q4_k", 512) is GgmlType.Q4_K and kind("q4_k", 512, is_output=True) is GgmlType.Q6_K
    assert kind("q4_k", 96) is GgmlType.Q5_0 and kind("q4_k", 96, is_output=True) is GgmlType.Q8_0
    assert kind("q4_0", 96) is GgmlType.Q4_0 and kind("q4_0", 96, is_output=True) is GgmlType.Q8_0
    assert kind("q4_0", 40) is None and kind("q4_k", 40) is None


@pytest.mark.parametrize(("kind", "limit"), [("Q4_K", 0.075), ("Q6_K", 0.02)])
def test_k_quants_come_from_ggml(kind, limit):
    """Normal weights lose about 6.5% at 4.5 bits a weight and 1.6% at 6.6 (Q4_0 loses 9%)."""
    pytest.importorskip("llama_cpp", reason="ggml's quantizer comes with llama-cpp-python")
    values = np.random.default_rng(1).standard_normal((16, 512)).astype(np.float32)
    blocks = quantize_rules.quantize_rows(values, GgmlType[kind])
    back = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert 0 < np.linalg.norm(back - values) < limit * np.linalg.norm(values)


def test_a_model_loads_in_q4_k(tmp_path):
    pytest.importorskip("llama_cpp", reason="ggml's quantizer comes with llama-cpp-python")
    folder = save_toy_model("olmoe", tmp_path / "toy", hidden_size=256, intermediate_size=32)
    exact = plain_model(folder)(PROMPT).logits
    with loaded(folder, quant="Q4_K") as model:
        kinds = {
            name: module.ggml_type for name, module in model.named_modules() if hasattr(module, "ggml_type")
        }
        assert kinds["lm_head"] is GgmlType.Q6_K and kinds["model.layers.0.self_attn.q_proj"] is GgmlType.Q4_K
        k_error = (model(PROMPT).logits - exact).norm()
    with loaded(folder, quant="q4_0") as model:
        assert k_error < (model(PROMPT).logits - exact).norm()


# --- the cache


def test_the_second_load_writes_nothing(folder, cache, capsys):
    with loaded(folder, quant="q8_0"):
        (path,) = cache.iterdir()
    assert "once" in capsys.readouterr().err
    before = path.stat()
    with loaded(folder, quant="q8_0"):
        after = path.stat()
    assert "quantizing" not in capsys.readouterr().err
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_another_format_or_weights_get_another_file(tmp_path, cache):
    folder = save_toy_model("qwen3_moe", tmp_path / "toy", moe_intermediate_size=32)
    weights = folder / "model.safetensors"
    quantize_silently(experts_plan(folder))
    quantize_silently(experts_plan(folder, "q4_0"))
    assert len(list(cache.iterdir())) == 2
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-2] ^= 0x10  # a weight of another value, in a file of the same size and times
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    quantize_silently(experts_plan(folder))
    os.utime(weights, ns=(0, 0))
    quantize_silently(experts_plan(folder))
    assert len(list(cache.iterdir())) == 4


def test_a_copy_of_the_folder_shares_the_file(folder, tmp_path, cache):
    quantize_silently(experts_plan(folder))
    copy = tmp_path / "somewhere élse" / folder.name
    copy.parent.mkdir()
    subprocess.run(["cp", "-a", folder, copy], check=True)
    _, lines = quantize_silently(experts_plan(copy))
    assert lines == [] and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "other identity"])
def test_a_damaged_file_is_made_again(folder, cache, damage):
    checkpoint, _ = quantize_silently(experts_plan(folder))
    path = checkpoint.files[-1]
    good = path.read_bytes()
    bad = {"truncated": good[:-1], "empty": b"", "other identity": good.replace(b"q8_0", b"q8_1")}[damage]
    if damage == "other identity":
        identity = quantize._identity(experts_plan(folder)).encode()
        bad = good.replace(identity, identity[::-1])
    path.write_bytes(bad)
    _, lines = quantize_silently(experts_plan(folder))
    assert "made again" in lines[0] and path.read_bytes() == good


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_stops_leaves_nothing(folder, cache, monkeypatch, error):
    calls = []

    def stop_in_the_middle(self, blocks, write=quantize_file._Output.write):
        calls.append(blocks)
        if len(calls) == 9:
            assert list(cache.glob("*.partial"))
            raise error
        write(self, blocks)

    monkeypatch.setattr(quantize_file._Output, "write", stop_in_the_middle)
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ConfigError
    with pytest.raises(wanted) as raised:
        quantize_silently(experts_plan(folder))
    if wanted is ConfigError:
        assert "No space left on device; free some space, or set XDG_CACHE_HOME" in str(raised.value)
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_written(folder, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")(1 << 30, 1 << 30, 1 << 20)
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ConfigError, match=r"where 1\.00 MiB are free and 64\.\d+ MiB are needed.*XDG_CACHE_HOME"
    ):
        quantize_silently(experts_plan(folder))
    assert list(cache.iterdir()) == []


def test_a_folder_that_changes_meanwhile_is_not_trusted(tmp_path, cache, monkeypatch):
    folder = save_toy_model("qwen3_moe", tmp_path / "toy", moe_intermediate_size=32)
    write = quantize.write_quantized

    def write_and_touch(*args):
        write(*args)
        os.utime(folder / "model.safetensors")

    monkeypatch.setattr(quantize, "write_quantized", write_and_touch)
    with pytest.raises(CheckpointError, match="was changed while it was quantized"):
        quantize_silently(experts_plan(folder))
    assert list(cache.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(folder, tmp_path, cache):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weights[name][4, 5] = float("nan")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.up' has NaN or infinity"):
        quantize_silently(experts_plan(tmp_path))
    assert list(cache.iterdir()) == []


# --- several processes


@contextmanager
def child(folder, pause):
    command = [sys.executable, str(CHILD), str(folder), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begin\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_killed_run_is_cleaned_up_by_the_next(folder, cache):
    with child(folder, 0.2) as process:
        assert process.stdout.readline().startswith("quantizing ")
        while not list(cache.glob("*.partial")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert {path.suffix for path in cache.iterdir()} == {".partial", ".lock"}
    quantize_silently(experts_plan(folder, "q4_0"))  # another file: it cleans up, too
    (path,) = cache.iterdir()
    assert "q4_0" in path.name


def test_of_two_processes_one_waits_for_the_other(folder, cache, tmp_path):
    with child(folder, tmp_path / "go") as first:
        assert first.stdout.readline().startswith("quantizing ")
        with child(folder, 0) as second:
            assert second.stdout.readline().startswith("another process is quantizing ")
            (tmp_path / "go").touch()
            out, _ = second.communicate(timeout=60)
        assert "quantizing " not in out and out.startswith("done ")
        rest, _ = first.communicate(timeout=60)
    assert rest.split()[-1] == out.split()[-1]
    assert [path.suffix for path in cache.iterdir()] == [".gguf"]


def test_who_waits_takes_over_when_the_other_dies(folder, cache):
    with child(folder, 5) as first:
        assert first.stdout.readline().startswith("quantizing ")
        with child(folder, 0) as second:
            assert second.stdout.readline().startswith("another process is quantizing ")
            first.send_signal(signal.SIGKILL)
            out, _ = second.communicate(timeout=60)
    assert out.startswith("quantizing ") and "done " in out
    (path,) = cache.iterdir()
    taken_over = path.read_bytes()
    path.unlink()
    quantize_silently(experts_plan(folder))
    assert path.read_bytes() == taken_over


# --- the command line


def test_the_command_line_quantizes_and_says_so(tiny_moe, cache, capsys):
    command = [
        "generate",
        "--model",
        str(tiny_moe),
        "--quant",
        "Q8_0",
        "--max-new-tokens",
        "3",
        "--prompt",
        "a",
    ]
    assert main(command) == 0
    first = capsys.readouterr()
    assert f"moe-offload: quantizing {tiny_moe} to q8_0 once: " in first.err
    assert main(command) == 0
    second = capsys.readouterr()
    assert "quantizing" not in second.err and second.out == first.out
    assert len(list(cache.iterdir())) == 1


def test_quantizing_and_loading_report_apart(tmp_path, cache):
    loading, quantizing = [], []
    options = {
        "progress": lambda *seen: loading.append(seen),
        "quant_progress": lambda *s: quantizing.append(s),
    }
    with loaded(save_toy_model("qwen3_moe", tmp_path / "model"), quant="q8_0", **options):
        (file,) = cache.iterdir()
    assert loading[-1][0] == loading[-1][1] and quantizing[-1][0] == quantizing[-1][1]
    assert (
        loading[-1][1] < quantizing[-1][1] < file.stat().st_size
    )  # dense weights; all but header and padding


# --- refusals


def test_a_budget_that_is_too_small_is_refused_before_quantizing(folder, cache):
    with pytest.raises(BudgetError, match="ram"):
        moe_offload.from_pretrained(folder, quant="q8_0", ram="64MiB")
    assert not cache.exists()


def test_threads_are_fewer_where_the_budget_is_small(folder, monkeypatch):
    monkeypatch.setattr(quantized, "base_bytes", lambda: 100 << 20)
    monkeypatch.setattr(quantized, "default_threads", lambda: 4)
    plan = experts_plan(folder)
    per_thread = quantize_file.workspace_bytes(plan, 1)
    assert quantized.threads_within(plan, (100 << 20) + 4 * per_thread) == 4
    assert quantized.threads_within(plan, (100 << 20) + 2 * per_thread) == 2
    with pytest.raises(BudgetError, match=r"124\.00 MiB are needed, 100\.00 MiB of it for the libraries"):
        quantized.threads_within(plan, 101 << 20)


@pytest.mark.parametrize("quant", ["q3", "", 4])
def test_an_unknown_quant_names_the_known_ones(folder, quant):
    with pytest.raises(ConfigError, match="known are q8_0, q4_0, q4_k"):
        moe_offload.from_pretrained(folder, quant=quant)


def test_a_gguf_is_quantized_already():
    with pytest.raises(ConfigError, match="is a GGUF and holds the types that its maker chose"):
        moe_offload.from_pretrained(quant="q4_0", ram="8GiB")


def test_q4_k_without_its_library_names_the_way(folder, monkeypatch):
    quantize_rules._ggml.cache_clear()
    monkeypatch.setattr(quantize_rules, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'moe_offload\[llama\]', or take q4_0 or q8_0"):
        moe_offload.from_pretrained(folder, quant="q4_k")


def test_a_checkpoint_in_which_nothing_changes_is_refused(folder):
    source = open_checkpoint(folder)
    layouts = {
        layer_idx: replace(
            layout, matrices=tuple(replace(m, ggml_type=GgmlType.MXFP4) for m in layout.matrices)
        )
        for layer_idx, layout in source.experts.layouts.items()
    }
    packed = replace(source, experts=replace(source.experts, layouts=layouts))
    with pytest.raises(ConfigError, match="quant=q8_0 changes nothing"):
        plan_quantization(packed, "q8_0", {})


def test_other_programs_can_read_what_the_file_is(folder):
    checkpoint, _ = quantize_silently(experts_plan(folder))
    fields = gguf.GGUFReader(checkpoint.files[-1]).fields
    assert fields["general.architecture"].contents() == "moe-offload-quantized"
    assert fields["moe-offload-quantized.folder"].contents() == str(folder)
    with pytest.raises(CheckpointError, match="moe-offload-quantized"):
        moe_offload.from_pretrained(checkpoint.files[-1])


@pytest.mark.slow
def test_the_peak_is_a_few_slices(tmp_path, cache):
    """A process that quantizes 96 MiB holds less than the workspace that the budget counts."""
    save_toy_model("mixtral", tmp_path, torch.bfloat16, hidden_size=512, intermediate_size=2048)
    code = (
        "import sys, runpy, gguf\n"
        "from moe_offload.residency.memory import peak_bytes\n"
        "before, sys.argv = peak_bytes(), sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(peak_bytes() - before)"
    )
    command = [sys.executable, "-c", code, str(CHILD), str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_bytes = int(done.stdout.split()[-1])
    plan = experts_plan(tmp_path)
    assert grown_bytes < quantize_file.workspace_bytes(plan, 1) + (8 << 20) < plan.source_bytes // 2
