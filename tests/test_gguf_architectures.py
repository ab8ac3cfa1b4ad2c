"""GGUF architecture by architecture: transformers, llama.cpp and ours give one model's logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_writer import RawTensor, edit_gguf
from test_gguf_models import (
    IDS,
    VOCAB_SIZE,
    assert_close_to_llama_cpp,
    fuse_gate_up,
    runtime_logits,
    save_tokenizer,
)
from three_way import assert_three_way, llama_cpp_logits, logits_from_spans, transformers_logits
from toy_models import plain_model
from transformers import AutoConfig, AutoModelForCausalLM

import moe_offload
from moe_offload import CheckpointError
from moe_offload.storage.checkpoint import open_checkpoint
from moe_offload.storage.expert_format import GgmlType

sys.path.append(str(Path(__file__).parents[1] / "bench" / "demo_model"))
from gguf_export import export

COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 32,
    "intermediate_size": 96, "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24, "v_head_dim": 20, "routed_scaling_factor": 1.5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
# Both limits lie outside the head: it makes no difference then that llama.cpp rounds them.
GPT_OSS_YARN = {
    "rope_type": "yarn", "rope_theta": 6.0, "factor": 2.0, "original_max_position_embeddings": 200,
    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
}  # fmt: skip
# llama.cpp knows the light ones, whose queries have no low rank, by their 27 layers.
V2_LITE = {
    **LATENT,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
V3 = {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
DELTA_NET = {
    "num_hidden_layers": 4, "num_experts": 8, "moe_intermediate_size": 32, "head_dim": 32,
    "shared_expert_intermediate_size": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2moe": (
        "qwen2_moe",
        {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96,
         "intermediate_size": 128, "norm_topk_prob": False, "decoder_sparse_step": 1},
    ),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 8, "intermediate_size": 32}),
    "granitemoe": (
        "granitemoe",
        {"num_local_experts": 8, "intermediate_size": 32, "embedding_multiplier": 3.0,
         "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 4.0},
    ),
    "granitemoe shared": (
        "granitemoeshared",
        {"num_local_experts": 8, "intermediate_size": 32, "shared_intermediate_size": 64,
         "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
         "logits_scaling": 4.0},
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 6, "intermediate_size": 32, "head_dim": 16, "sliding_window": 8,
         "rope_parameters": GPT_OSS_YARN},
    ),
    "deepseek2 lite": ("deepseek_v2", V2_LITE),
    "deepseek2 yarn": (
        "deepseek_v2",
        {**V2_LITE, "num_hidden_layers": 3, "q_lora_rank": 24, "rope_parameters": YARN},
    ),
    "deepseek2 v3": ("deepseek_v3", V3),
    "deepseek2 v3 yarn": (
        "deepseek_v3", {**V3, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek2 glm": (
        "glm4_moe_lite",
        {**LATENT, "q_lora_rank": 24, "norm_topk_prob": True,
         "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "glm4moe": (
        "glm4_moe",
        {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 32, "intermediate_size": 96,
         "first_k_dense_replace": 1, "head_dim": 16, "use_qk_norm": True, "attention_bias": True,
         "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "qwen3next": ("qwen3_next", {**DELTA_NET, "intermediate_size": 96, "norm_topk_prob": True}),
    "qwen35moe": (
        "qwen3_5_moe_text",
        {**DELTA_NET, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
    ),
    "lfm2moe": (
        "lfm2_moe",
        {"num_hidden_layers": 4, "num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96,
         "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
         "tie_word_embeddings": True},
    ),
    "gemma4": (
        "gemma4_text",
        {"num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
         "intermediate_size": 96, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
         "moe_intermediate_size": 32, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
         "sliding_window": 8, "tie_word_embeddings": True, "final_logit_softcapping": 30.0,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}  # fmt: skip


# Models that llama.cpp computes in another way than transformers, or not at all.
LLAMA_CPP_DIFFERS: dict[str, tuple[str, dict[str, Any]]] = {
    # RMSNorm without its bias and a renormalised softmax there; LayerNorm and sparsemixer in the model.
    "phimoe": ("phimoe", {"num_local_experts": 8, "intermediate_size": 32}),
    "phimoe biases": (
        "phimoe",
        {"num_local_experts": 8, "intermediate_size": 32, "attention_bias": True, "lm_head_bias": True},
    ),
    # It reads no clamp for this architecture. The published models have none.
    "olmoe clipped": ("olmoe", {"num_experts": 8, "intermediate_size": 32, "clip_qkv": 0.5}),
    # It sums the two best of a group, as DeepSeek-V3 does; V2 takes the best one.
    "deepseek2 v2 groups": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    # It rounds YaRN's limits; gpt-oss was trained with limits that are not.
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 6, "intermediate_size": 32, "head_dim": 16, "sliding_window": 8,
         "rope_parameters": {**GPT_OSS_YARN, "rope_theta": 10000.0, "original_max_position_embeddings": 64}},
    ),
}  # fmt: skip
ALL_MODELS = MODELS | {f"{name}, by transformers": model for name, model in LLAMA_CPP_DIFFERS.items()}


# Rows of whole blocks, and no groups: a token is to use all experts.
QUANTIZABLE = {
    "deepseek2 v3": {
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "q_lora_rank": 32,
        "n_group": 1,
        "topk_group": 1,
    },
}


def save_model(folder: Path, name: str, **overrides: Any) -> Path:
    """Save a random model of the family with a tokenizer that llama.cpp takes."""
    family, settings = ALL_MODELS[name]
    torch.manual_seed(20)
    folder.mkdir(exist_ok=True)
    config = AutoConfig.for_model(family, **{**COMMON, **settings, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in (*model.parameters(), *correction_biases(model)):
            parameter.normal_(0.0, 0.15 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def correction_biases(model: Any) -> list[torch.Tensor]:
    names = ("e_score_correction_bias", "expert_bias", "layer_scalar")
    return [buffer for name, buffer in model.named_buffers() if name.endswith(names)]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_model(tmp_path_factory.mktemp("hf") / name.replace(" ", "_"), name)
        return made[name]

    return folder


@pytest.mark.parametrize("name", MODELS)
def test_three_programs_agree_on_an_architecture(name: str, folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of(name)
    path = export(folder, tmp_path / "model.gguf")
    # llama.cpp looks GELU up in a table of half floats.
    share = 1e-2 if name == "gemma4" else 1e-3
    assert_three_way(folder, path, IDS, logits_from_spans, share)
    assert_three_way(folder, path, IDS, runtime_logits, share)


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek2 v3", "qwen35moe", "gemma4"])
def test_an_answer_is_that_of_transformers(name: str, folder_of: Any, tmp_path: Path) -> None:
    """Token after token, with biases, latents, running states and windows on the way."""
    folder = folder_of(name)
    model = moe_offload.from_pretrained(
        export(folder, tmp_path / "model.gguf"), ram="8GiB", experts="50%", context=128
    )
    plain = plain_model(folder)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answers = [each.generate(torch.tensor([IDS[:12]]), **options) for each in (model, plain)]
    model.offload.close()
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", [f"{name}, by transformers" for name in LLAMA_CPP_DIFFERS])
def test_where_llama_cpp_differs_transformers_is_followed(name: str, folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of(name)
    path = export(folder, tmp_path / "model.gguf")
    assert torch.equal(logits_from_spans(path, IDS), transformers_logits(folder, IDS))


@pytest.mark.parametrize("name", ["deepseek2 v3", "deepseek2 glm"])
def test_the_latents_projection_may_be_whole(name: str, folder_of: Any, tmp_path: Path) -> None:
    """Files of 2024 hold kv_b as it is, and state the heads' real sizes under the plain keys."""
    path = export(folder_of(name), tmp_path / "halves.gguf")
    whole = export(folder_of(name), tmp_path / "whole.gguf", kv_b_split=False)
    old = edit_gguf(
        whole,
        tmp_path / "old.gguf",
        {
            "deepseek2.attention.key_length": ("u32", 40), "deepseek2.attention.key_length_mla": None,
            "deepseek2.attention.value_length": ("u32", 20), "deepseek2.attention.value_length_mla": None,
            "deepseek2.attention.head_count_kv": ("u32", 4),
        },
    )  # fmt: skip
    assert torch.equal(logits_from_spans(old, IDS), logits_from_spans(path, IDS))
    assert (llama_cpp_logits(old, IDS) - logits_from_spans(old, IDS)).abs().max() < 1e-3
    unnamed = edit_gguf(old, tmp_path / "unnamed.gguf", {"deepseek2.expert_gating_func": None})
    assert open_checkpoint(unnamed).config == open_checkpoint(old).config  # corrected scores are sigmoids


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("qwen2moe", {"exps": "Q4_0"}),
        ("gpt-oss", {"exps": "MXFP4"}),
        ("deepseek2 v3", {"attn_k_b": "Q5_0"}),
        ("glm4moe", {}),
        ("granitemoe shared", {"shexp": "Q4_1", "ffn_up_shexp": "Q5_1"}),
        ("qwen3next", {"attn_qkv": "Q5_0"}),
        ("qwen35moe", {}),
        ("lfm2moe", {}),
        ("gemma4", {"exps": "Q4_0"}),
    ],
)
def test_quantized_files_of_an_architecture_are_as_close_as_llama_cpp(
    name: str, types: dict[str, str], tmp_path: Path
) -> None:
    """Q8_0 but for ``types`` by a part of the name; a token uses all experts, see the callee."""
    experts = 6 if name == "gpt-oss" else 8
    folder = save_model(tmp_path / "hf", name, num_experts_per_tok=experts, **QUANTIZABLE.get(name, {}))

    def type_of(tensor: str) -> str:
        return next((kind for part, kind in reversed(types.items()) if part in tensor), "Q8_0")

    # Random running states amplify what 8-bit activations lose.
    share = 0.15 if name in ("qwen3next", "qwen35moe", "gemma4") else 0.05
    assert_close_to_llama_cpp(export(folder, tmp_path / "model.gguf", type_of), share)


def test_columns_that_no_block_holds_whole_become_float(folder_of: Any, tmp_path: Path) -> None:
    """Value heads of 16 columns in blocks of 32: ssm_out is dequantized, and counted so."""
    path = export(folder_of("qwen35moe"), tmp_path / "model.gguf", lambda name: "Q8_0")
    checkpoint = open_checkpoint(path)
    projection = checkpoint.dense["model.layers.0.linear_attn.out_proj.weight"]
    assert projection.ggml_type is GgmlType.F32
    assert projection.span.num_bytes == 64 * 64 // 32 * 34  # in the file


def test_layers_that_predict_further_tokens_are_dropped(folder_of: Any, tmp_path: Path) -> None:
    plain = export(folder_of("glm4moe"), tmp_path / "plain.gguf")

    def add_layer(tensors: dict[str, RawTensor]) -> None:
        for name in [name for name in tensors if name.startswith("blk.2.")]:
            tensors[name.replace("blk.2.", "blk.3.")] = tensors[name]
        tensors["blk.3.nextn.eh_proj.weight"] = RawTensor([128, 64], 0, bytes(128 * 64 * 4))
        for norm in ("enorm", "hnorm"):
            tensors[f"blk.3.nextn.{norm}.weight"] = RawTensor([64], 0, bytes(64 * 4))

    keys = {"glm4moe.block_count": ("u32", 4), "glm4moe.nextn_predict_layers": ("u32", 1)}
    path = edit_gguf(plain, tmp_path / "model.gguf", keys, add_layer)
    assert open_checkpoint(path).spec.num_hidden_layers == 3
    assert torch.equal(logits_from_spans(path, IDS), logits_from_spans(plain, IDS))
    assert torch.equal(llama_cpp_logits(path, IDS), llama_cpp_logits(plain, IDS))


@pytest.mark.parametrize("name", ["qwen2moe", "deepseek2 v3", "granitemoe"])
def test_gate_and_up_may_be_one_tensor(name: str, folder_of: Any, tmp_path: Path) -> None:
    path = export(folder_of(name), tmp_path / "model.gguf")
    fused = edit_gguf(path, tmp_path / "fused.gguf", change=fuse_gate_up)
    assert torch.equal(logits_from_spans(fused, IDS), logits_from_spans(path, IDS))


def test_a_long_context_of_phimoe_takes_its_factors_from_tensors(tmp_path: Path) -> None:
    """Phi-3.5-MoE's scale is in no key: the published model's own is used."""
    longrope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 3.0, 3.0],
        "long_factor": [1.0, 1.25, 1.5, 2.0, 4.0, 8.0, 8.0, 16.0],
        "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122,
    }  # fmt: skip
    folder = save_model(tmp_path / "hf", "phimoe, by transformers", rope_parameters=longrope)

    def add_factors(tensors: dict[str, torch.Tensor]) -> None:
        for kind in ("long", "short"):
            tensors[f"rope_factors_{kind}.weight"] = torch.tensor(longrope[f"{kind}_factor"])

    path = export(folder, tmp_path / "model.gguf", change=add_factors)
    for ids in (IDS[:16], IDS):
        assert torch.equal(logits_from_spans(path, ids), transformers_logits(folder, ids))


def test_keys_that_change_nothing_are_accepted(folder_of: Any, tmp_path: Path) -> None:
    """Converters write what config.json names: Qwen3-Coder's files say that a shared expert has 0 columns."""
    good = export(folder_of("olmoe"), tmp_path / "good.gguf")
    keys: dict[str, Any] = {
        "expert_shared_feed_forward_length": ("u32", 0), "expert_group_count": ("u32", 1),
        "expert_weights_scale": ("f32", 1.0), "rope.scaling.type": ("str", "none"),
        "rope.scaling.factor": ("f32", 8.0), "vocab_size": ("u32", VOCAB_SIZE),
    }  # fmt: skip
    path = edit_gguf(good, tmp_path / "more.gguf", {f"olmoe.{name}": item for name, item in keys.items()})
    assert open_checkpoint(path).config == open_checkpoint(good).config
    keys["expert_weights_scale"] = ("f32", 2.5)
    bad = edit_gguf(good, tmp_path / "bad.gguf", {f"olmoe.{name}": item for name, item in keys.items()})
    with pytest.raises(CheckpointError, match=r"does not know: olmoe.expert_weights_scale;"):
        open_checkpoint(bad)


BAD_KEYS = {
    "qwen2moe": (
        "qwen2moe.attention.novelty",
        ("u32", 1),
        r"keys that this version .*: qwen2moe.attention.nov",
    ),
    "deepseek2 v3": (
        "deepseek2.expert_gating_func",
        ("u32", 3),
        r"expert_gating_func is 3; 1 \(softmax\) and",
    ),
    "deepseek2 v3 yarn": ("deepseek2.attention.kv_lora_rank", None, r"kv_lora_rank is missing"),
    "deepseek2 lite": (
        "deepseek2.expert_weights_norm",
        ("bool", True),
        r"expert_weights_norm is set with softmax",
    ),
    "glm4moe": (
        "glm4moe.nextn_predict_layers",
        ("u32", 3),
        r"nextn_predict_layers is 3, but block_count is 3",
    ),
    "granitemoe": (
        "granitemoe.residual_scale",
        None,
        r"residual_scale must be a positive number, found None",
    ),
    "gpt-oss": ("gpt-oss.attention.sliding_window", None, r"sliding_window is missing"),
    "lfm2moe": ("lfm2moe.shortconv.l_cache", None, r"shortconv.l_cache is missing"),
    "gemma4": ("gemma4.embedding_length_per_layer_input", ("u32", 8), r"embeddings for each layer are not"),
    "qwen35moe": (
        "qwen35moe.ssm.inner_size",
        ("u32", 63),
        r"inner_size is 63, not a multiple of the 4 value",
    ),
    "olmoe": ("olmoe.expert_used_count", ("u32", 99), r"expert_used_count must be an integer from 1 to 8"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_key_that_is_missing_unknown_or_wrong_is_named(name: str, folder_of: Any, tmp_path: Path) -> None:
    key, item, message = BAD_KEYS[name]
    good = export(folder_of(name), tmp_path / "good.gguf")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(edit_gguf(good, tmp_path / "bad.gguf", {key: item}))
