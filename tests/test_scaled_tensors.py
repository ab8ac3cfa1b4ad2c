"""MXFP4 and fine-grained FP8 folders: read as they are, put together in slots, never inflated."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from reference import linear_float
from safetensors.torch import load_file, save_file
from test_header_costs import check_against_the_runtime
from toy_models import plain_model, save_toy_model
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moe_offload
from moe_offload import CheckpointError, _native, ops
from moe_offload.planning.cost_model import scale_copies_bytes
from moe_offload.runtime.quant_modules import QuantLinear
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.expert_format import ExpertKey, GgmlType, OwnType, Relayout
from moe_offload.storage.expert_store import ExpertStore
from moe_offload.storage.io import Arena, open_reader

IDS = torch.tensor([[7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]])
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """(gpt-oss folder as it is published, the same weights dequantized by transformers in float32)."""
    quantized, plain = tmp_path_factory.mktemp("mxfp4"), tmp_path_factory.mktemp("mxfp4_float")
    for folder in (quantized, plain):
        save_toy_model("gpt_oss", folder, hidden_size=96, intermediate_size=64, num_experts_per_tok=6)
    tensors = load_file(quantized / "model.safetensors")
    floats = dict(tensors)
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 124, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(tensors, quantized / "model.safetensors")
    save_file(floats, plain / "model.safetensors")
    set_config(
        quantized, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    return quantized, plain


def to_fp8(weight, scale_dtype):
    """(rows, cols) float32 -> e4m3 codes and a scale for each 128 x 128."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % 128))
    blocks = padded.view(-1, 128, cols // 128, 128)
    scales = (blocks.abs().amax(dim=(1, 3)) / 448).to(scale_dtype)
    codes = (blocks / scales.float()[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    exact = codes.float() * scales.float()[:, None, :, None]
    return codes.view(-1, cols)[:rows].contiguous(), scales, exact.view(-1, cols)[:rows].contiguous()


@pytest.fixture(scope="module", params=[("qwen3_moe", torch.float32), ("deepseek_v3", torch.bfloat16)])
def fp8(request, tmp_path_factory):
    """(folder with FP8 linear layers and experts, the same weights dequantized in float32)."""
    family, scale_dtype = request.param
    quantized, plain = tmp_path_factory.mktemp("fp8"), tmp_path_factory.mktemp("fp8_float")
    shape = {"hidden_size": 128, "moe_intermediate_size": 256, "intermediate_size": 128}
    if family == "deepseek_v3":
        shape |= {"q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32}
    for folder in (quantized, plain):
        save_toy_model(family, folder, **shape)
    tensors = load_file(quantized / "model.safetensors")
    floats = dict(tensors)
    for name in [
        name for name in tensors if name.endswith("_proj.weight") and tensors[name].shape[1] % 128 == 0
    ]:
        codes, scales, exact = to_fp8(tensors[name], scale_dtype)
        tensors[name], tensors[f"{name}_scale_inv"], floats[name] = codes, scales, exact
    save_file(tensors, quantized / "model.safetensors")
    save_file(floats, plain / "model.safetensors")
    set_config(quantized, quantization_config=FP8_CONFIG)
    return quantized, plain


def slot_of(checkpoint, key):
    """Read one expert as the cache does; its matrices' bytes."""
    layout = checkpoint.experts.layouts[key.layer_idx]
    arena = Arena(layout.slot_bytes)
    store = ExpertStore(checkpoint.experts, checkpoint.files, open_reader())
    store.wait(store.read(key, arena.address, speculative=False))
    matrices = [
        torch.frombuffer(
            (np.ctypeslib.ctypes.c_uint8 * form.num_bytes).from_address(address), dtype=torch.uint8
        ).clone()
        for address, form in zip(store.addresses(key, arena.address), layout.matrices, strict=True)
    ]
    store.close()
    arena.close()
    return layout, matrices


def test_an_mxfp4_slot_holds_ggml_blocks_of_the_same_numbers(mxfp4):
    quantized, plain = mxfp4
    checkpoint = open_checkpoint(quantized)
    floats = load_file(plain / "model.safetensors")
    for key in (ExpertKey(0, 0), ExpertKey(2, 5)):
        layout, matrices = slot_of(checkpoint, key)
        for form, packed, name in zip(layout.matrices, matrices, ("gate_up_proj", "down_proj"), strict=True):
            assert form.ggml_type is GgmlType.MXFP4 and not form.transposed
            found = gguf.quants.dequantize(
                packed.view(form.rows, -1).numpy(), gguf.GGMLQuantizationType.MXFP4
            )
            expected = floats[f"model.layers.{key.layer_idx}.mlp.experts.{name}"][key.expert_id].T
            assert np.array_equal(found, expected.numpy())


def test_headers_count_packed_weights_and_copies_of_scales_as_the_runtime(mxfp4, fp8, monkeypatch):
    for folder in (mxfp4[0], fp8[0]):
        checkpoint = check_against_the_runtime(folder, monkeypatch)
        assert scale_copies_bytes(checkpoint.experts.layouts) > 0


def test_an_mxfp4_slot_is_not_larger_than_its_blocks(mxfp4):
    """17 bytes for 32 weights, in memory as in the file, and whole pages around them."""
    checkpoint = open_checkpoint(mxfp4[0])
    layout = checkpoint.experts.layouts[0]
    assert layout.expert_bytes == (2 * 64 * 96 + 96 * 64) // 32 * 17
    assert layout.slot_bytes <= layout.expert_bytes + 2 * 4 * 4096


@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_gpt_oss_runs_from_its_mxfp4_folder(mxfp4, io_mode, monkeypatch):
    """Every token uses all experts, so that rounding flips no choice; activations are quantized."""
    monkeypatch.setenv("MOE_OFFLOAD_IO", io_mode)
    quantized, plain = mxfp4
    with torch.no_grad():
        exact = plain_model(plain, dtype=torch.float64)(IDS).logits
    logits = []
    for options in ({"experts": 6, "prefetch": False}, {"experts": "all"}):
        model = moe_offload.from_pretrained(quantized, ram="8GiB", context=64, **options)
        with torch.no_grad():
            logits.append(model(IDS).logits)
        model.offload.close()
    assert torch.equal(*logits)
    assert (logits[0].double() - exact).norm() < 0.02 * exact.norm()


def test_an_fp8_model_equals_its_dequantized_weights(fp8):
    """No activation is quantized: as near to plain float32 as any float model."""
    quantized, plain = fp8
    with torch.no_grad():
        expected = plain_model(plain, dtype=torch.float32)(IDS).logits
    logits = []
    for options in ({"experts": 2, "prefetch": False}, {"experts": "all"}):
        model = moe_offload.from_pretrained(quantized, ram="8GiB", context=64, dtype="float32", **options)
        packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert packed and {module.ggml_type for module in packed} == {OwnType.F8_E4M3}
        with torch.no_grad():
            logits.append(model(IDS).logits)
        held = sum(p.numel() * p.itemsize for p in model.parameters())
        assert held <= model.offload.plan.dense_bytes
        model.offload.close()
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))


def test_an_fp8_slot_holds_the_files_codes_and_scales(fp8):
    quantized, plain = fp8
    floats = load_file(plain / "model.safetensors")
    layout, matrices = slot_of(open_checkpoint(quantized), ExpertKey(1, 3))
    for form, packed, name in zip(layout.matrices, matrices, ("gate", "up", "down"), strict=True):
        expected = floats[f"model.layers.1.mlp.experts.3.{name}_proj.weight"]
        assert torch.equal(ops.dequantize(packed, form).float(), expected)


def fp8_blocks(rows, cols, seed):
    """Every code, NaN but for one, and scales of many sizes: (rows, row bytes) and their float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, cols // 128, 128)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    scales = np.float32(2.0) ** rng.integers(-20, 10, (rows, cols // 128, 1)) * np.float32(1.37)
    packed = np.concatenate([scales.astype(np.float32).view(np.uint8), codes], axis=2).reshape(rows, -1)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy() * scales
    return packed, values.reshape(rows, cols).astype(np.float32)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("tokens", [1, 3, 35])
def test_fp8_rows_have_the_bits_of_the_float_path(isa, tokens):
    packed, values = fp8_blocks(37, 384, seed=tokens)
    x = np.random.default_rng(tokens).standard_normal((tokens, 384)).astype(np.float32)
    before = _native.isa()
    _native.force_isa(isa)
    try:
        weight = torch.from_numpy(packed)
        found = ops.linear(torch.from_numpy(x), weight, OwnType.F8_E4M3, 37, 384)
        rows = ops.embedding_rows(torch.arange(37), weight, OwnType.F8_E4M3, 37, 384)
    finally:
        _native.force_isa(before)
    assert np.array_equal(found.numpy(), linear_float(x, values))
    assert np.array_equal(rows.numpy(), values)


def test_every_e4m3_code_is_torchs():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    packed = torch.cat([torch.ones(2, 1).view(torch.uint8), codes], dim=1)
    found = ops.embedding_rows(torch.arange(2), packed, OwnType.F8_E4M3, 2, 128)
    torch.testing.assert_close(found, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("relayout", list(Relayout))
def test_blocks_may_be_written_over_their_own_codes(relayout):
    """In a slot the codes end at most where the blocks end; apart, the result is the same."""
    rows, cols = 130, 256
    generator = torch.Generator().manual_seed(int(relayout))
    code_bytes = rows * cols // (2 if relayout is Relayout.MXFP4 else 1)
    blocks_bytes = rows * cols // 32 * 17 if relayout is Relayout.MXFP4 else rows * cols // 128 * 132
    codes = torch.randint(256, (code_bytes,), generator=generator, dtype=torch.uint8)
    scales = torch.randint(256, (rows * cols // 8,), generator=generator, dtype=torch.uint8)
    apart, over = torch.empty(blocks_bytes, dtype=torch.uint8), torch.empty(blocks_bytes, dtype=torch.uint8)
    _native.relayout(int(relayout), scales.data_ptr(), codes.data_ptr(), apart.data_ptr(), rows, cols)
    over[-code_bytes:] = codes
    _native.relayout(
        int(relayout), scales.data_ptr(), over[-code_bytes:].data_ptr(), over.data_ptr(), rows, cols
    )
    assert torch.equal(apart, over)


BAD_METHODS = [
    ({"quant_method": "gptq", "bits": 4}, r"'gptq', which is not supported.*bf16.*GGUF"),
    ({"quant_method": "awq"}, r"'awq'"),
    ({"quant_method": "bitsandbytes"}, r"'bitsandbytes'"),
    ({"quant_method": "compressed-tensors"}, r"'compressed-tensors'"),
    ("gptq", r"'gptq'"),
    ({"load_in_4bit": True}, r"'bitsandbytes'"),
    ({}, r"None, which is not supported"),
    ({"quant_method": "mxfp4"}, r"mxfp4 is read for gpt_oss only, not for 'qwen3_moe'"),
    ({"quant_method": "fp8"}, r"weight_block_size is None"),
    ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\]"),
]


@pytest.mark.parametrize(("method", "message"), BAD_METHODS)
def test_another_method_is_refused_by_its_name(method, message, tiny_moe, tmp_path):
    (tmp_path / "config.json").write_text((tiny_moe / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(tiny_moe / "model.safetensors")
    set_config(tmp_path, quantization_config=method)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization", {"group_size": 64, "bits": 4}, r"'mlx'"),
        ("compression_config", {"quant_method": "compressed-tensors"}, r"'compressed-tensors'"),
    ],
)
def test_a_method_under_another_key_is_refused_by_its_name(key, value, message, tiny_moe, tmp_path):
    (tmp_path / "config.json").write_text((tiny_moe / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(tiny_moe / "model.safetensors")
    set_config(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


DAMAGE = [
    (
        lambda t: t.pop("model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"),
        r"has no scales: '.*_scale_inv",
    ),
    (lambda t: t.pop("model.layers.0.mlp.experts.0.up_proj.weight"), r"belongs to no F8_E4M3 tensor"),
    (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(3, 1)}),
        r"has shape \(3, 1\), its codes of shape .* want \(1, 1\)",
    ),
    (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1).half()}),
        r"has dtype F16; scales must be F32 or BF16",
    ),
    (
        lambda t: t.update({"model.norm.weight": torch.ones(128).to(torch.float8_e4m3fn)}),
        r"'model.norm.weight' has no scales",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
@pytest.mark.parametrize("fp8", [("qwen3_moe", torch.float32)], indirect=True)
def test_codes_and_scales_that_do_not_fit_are_refused(damage, message, fp8, tmp_path):
    tensors = load_file(fp8[0] / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((fp8[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
