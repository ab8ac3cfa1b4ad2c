"""A Hugging Face folder as GGUF by the rules of llama.cpp's converter, for architectures of the tests.

Names come from gguf-py's own tables. What a rule does to a tensor or writes as a key is stated here
once more, on the converter's side: our reader is not used, and llama.cpp must accept the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from export_gguf import add_rope, add_tokenizer
from safetensors.torch import load_file
from torch import Tensor

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]


def export(
    folder: Path,
    path: Path,
    types: Callable[[str], str] = lambda name: "F32",
    *,
    change: Callable[[Tensors], None] = lambda tensors: None,
    keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    kv_b_split: bool = True,
) -> Path:
    """Write ``folder`` as ``path``.

    Args:
        types: GGUF name to ggml type; one-dimensional tensors and routers stay F32.
        change: edits the tensors by GGUF name before they are written.
        keys: adds further metadata.
        kv_b_split: MLA's kv_b in halves (files since 2025), or whole.
    """
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("num_experts", config.get("num_local_experts", config.get("n_routed_experts")))
    name, rule = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, name)
    add_common(writer, config)
    rule(writer, config)
    keys(writer)
    add_tokenizer(writer, folder, config, "gpt-2")
    tensors = dict(renamed(folder, name, config, kv_b_split))
    change(tensors)
    if config["model_type"] == "gemma4_text":
        tensors["rope_freqs.weight"] = unturned_divisors(config)
    for tensor_name, weight in tensors.items():
        is_small = weight.dim() == 1 or "ffn_gate_inp" in tensor_name or tensor_name.endswith(".bias")
        is_small |= any(part in tensor_name for part in ("ssm_conv1d", "shortconv.conv"))
        kind = gguf.GGMLQuantizationType["F32" if is_small else types(tensor_name)]
        writer.add_tensor(
            tensor_name, gguf.quants.quantize(weight.contiguous().numpy(), kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_common(writer: gguf.GGUFWriter, config: Config) -> None:
    """What the converter's base class writes for every text model."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    if config.get("intermediate_size"):
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        pass  # gemma4: by kind of layer
    elif rope.get("rope_type") == "longrope":  # the factors become tensors
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_scaling_attn_factors(1.19)
    else:
        add_rope(writer, config)
    for name, add in (
        ("num_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("n_group", writer.add_expert_group_count),
        ("topk_group", writer.add_expert_group_used_count),
    ):
        if config.get(name) is not None:
            add(config[name])


def add_heads(writer: gguf.GGUFWriter, config: Config) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def qwen2moe(writer: gguf.GGUFWriter, config: Config) -> None:
    add_heads(writer, config)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def olmoe(writer: gguf.GGUFWriter, config: Config) -> None:
    add_heads(writer, config)
    if config.get("clip_qkv") is not None:
        writer.add_clamp_kqv(config["clip_qkv"])


def granitemoe(writer: gguf.GGUFWriter, config: Config) -> None:
    add_heads(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    if config.get("shared_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])


def gpt_oss(writer: gguf.GGUFWriter, config: Config) -> None:
    add_heads(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def phimoe(writer: gguf.GGUFWriter, config: Config) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_dim)
    rope = config["rope_parameters"]
    writer.add_rope_scaling_orig_ctx_len(
        rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    )
    writer.add_sliding_window(config.get("sliding_window") or 0)


def routing(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace") or 0)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])


def deepseek2(writer: gguf.GGUFWriter, config: Config) -> None:
    latent, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    routing(writer, config)
    writer.add_head_count_kv(1)
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rotary)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotary)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rotary)
    sigmoid = config["model_type"] != "deepseek_v2"
    kinds = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    if sigmoid and config["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)
    mscale = config["rope_parameters"].get("mscale_all_dim")
    if mscale is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * mscale)


def glm4moe(writer: gguf.GGUFWriter, config: Config) -> None:
    add_heads(writer, config)
    routing(writer, config)
    writer.add_rope_dimension_count(
        int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"])
    )
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config["norm_topk_prob"])


def delta_net(writer: gguf.GGUFWriter, config: Config) -> None:
    add_heads(writer, config)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(4)
    writer.add_rope_dimension_count(
        int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"])
    )


def qwen35moe(writer: gguf.GGUFWriter, config: Config) -> None:
    delta_net(writer, config)
    writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])


def lfm2moe(writer: gguf.GGUFWriter, config: Config) -> None:
    heads = config["num_key_value_heads"]
    writer.add_head_count_kv([heads * (kind == "full_attention") for kind in config["layer_types"]])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_leading_dense_block_count(config["num_dense_layers"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])


def gemma4(writer: gguf.GGUFWriter, config: Config) -> None:
    windowed = [kind == "sliding_attention" for kind in config["layer_types"]]
    full = next(iter(config["per_layer_config"].values()))
    writer.add_expert_used_count(config["top_k_experts"])
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(windowed)
    for size, add in (
        (full["head_dim"], (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count)),
        (config["head_dim"],
         (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa)),
    ):  # fmt: skip
        for function in add:
            function(size)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count_kv(
        [config["num_key_value_heads"] if window else full["num_key_value_heads"] for window in windowed]
    )
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


ARCHITECTURES: dict[str, tuple[str, Callable[[gguf.GGUFWriter, Config], None]]] = {
    "qwen2_moe": ("qwen2moe", qwen2moe),
    "olmoe": ("olmoe", olmoe),
    "granitemoe": ("granitemoe", granitemoe),
    "granitemoeshared": ("granitemoe", granitemoe),
    "gpt_oss": ("gpt-oss", gpt_oss),
    "phimoe": ("phimoe", phimoe),
    "deepseek_v2": ("deepseek2", deepseek2),
    "deepseek_v3": ("deepseek2", deepseek2),
    "glm4_moe_lite": ("deepseek2", deepseek2),
    "glm4_moe": ("glm4moe", glm4moe),
    "qwen3_next": ("qwen3next", delta_net),
    "qwen3_5_moe_text": ("qwen35moe", qwen35moe),
    "lfm2_moe": ("lfm2moe", lfm2moe),
    "gemma4_text": ("gemma4", gemma4),
}


def renamed(
    folder: Path, architecture: str, config: Config, kv_b_split: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its GGUF name."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    source: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        source |= {name: weight.float() for name, weight in load_file(file).items()}
    if config.get("tie_word_embeddings"):
        source.pop("lm_head.weight", None)
    for name, weight in merged_experts(source, config).items():
        for part_name, part in split(name, weight, config, kv_b_split):
            found = part_name  # named already
            if not found.startswith("blk."):
                found = names.get_name(part_name, try_suffixes=(".weight", ".bias"))
            assert found is not None, f"gguf-py knows no {part_name} in {architecture}"
            yield found, part


def merged_experts(source: Tensors, config: Config) -> Tensors:
    """Stack the experts of a layer, matrix by matrix, under the name that the converter gives them."""
    stacked: Tensors = {}
    for name, weight in source.items():
        head, _, tail = name.partition(".experts.")
        expert_id, _, leaf = tail.partition(".")
        if not expert_id.isdigit():
            stacked[name] = weight
        elif expert_id == "0":
            names = [f"{head}.experts.{i}.{leaf}" for i in range(config["num_experts"])]
            stacked[f"{head}.experts.{leaf}"] = torch.stack([source[expert] for expert in names])
    return stacked


def split(name: str, weight: Tensor, config: Config, kv_b_split: bool) -> Iterator[tuple[str, Tensor]]:
    """What the converters of the families do to a tensor."""
    family = config["model_type"]
    if family.startswith("granitemoe"):
        yield from granite_tensor(name, weight, config)
    elif family == "gpt_oss":
        yield from gpt_oss_tensor(name, weight)
    elif family in ("qwen3_next", "qwen3_5_moe_text"):
        yield from delta_net_tensor(name, weight, config)
    elif family == "lfm2_moe":
        name = name.replace("expert_bias", "expert_bias.bias")
        is_expert = ".experts." in name
        yield (
            name.removeprefix("model." if is_expert else ""),
            weight.squeeze(1) if "conv.conv" in name else weight,
        )
    elif family == "gemma4_text":
        yield from gemma4_tensor(name, weight)
    elif name.endswith("kv_b_proj.weight") and kv_b_split:
        heads, value = config["num_attention_heads"], config["v_head_dim"]
        key_b, value_b = weight.view(heads, -1, weight.shape[-1]).split(
            [config["qk_nope_head_dim"], value], dim=1
        )
        yield name.replace("kv_b_proj", "k_b_proj"), key_b.transpose(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), value_b
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("e_score_correction_bias", "e_score_correction.bias"), weight
    elif name.endswith("shared_expert_gate.weight"):
        yield name, weight.squeeze()
    else:
        yield name, weight


def granite_tensor(name: str, weight: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    if name.endswith("input_linear.weight"):
        kind = "exps" if "block_sparse_moe" in name else "shexp"
        gate, up = weight.chunk(2, dim=-2)
        yield f"{layer}ffn_gate_{kind}.weight", gate
        yield f"{layer}ffn_up_{kind}.weight", up
    elif "q_proj" in name or "k_proj" in name:
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        yield name, rotary_order(weight, heads)
    else:
        yield name, weight


def rotary_order(weight: Tensor, heads: int) -> Tensor:
    """Each head's two rotary halves interleaved, for llama.cpp rotates neighbours."""
    rows = weight.shape[0]
    return (
        weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gpt_oss_tensor(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """bf16 folders hold experts transposed with gate and up interleaved."""
    if "down_proj_bias" in name:
        yield name.replace("down_proj_bias", "down_proj.bias"), weight
    elif "down_proj" in name:
        yield f"{name}.weight", weight.transpose(-1, -2)
    elif "gate_up_proj_bias" in name:
        yield name.replace("gate_up_proj_bias", "gate_proj.bias"), weight[..., ::2]
        yield name.replace("gate_up_proj_bias", "up_proj.bias"), weight[..., 1::2]
    elif "gate_up_proj" in name:
        yield name.replace("gate_up_proj", "gate_proj.weight"), weight.transpose(-1, -2)[:, ::2]
        yield name.replace("gate_up_proj", "up_proj.weight"), weight.transpose(-1, -2)[:, 1::2]
    elif name.endswith("sinks"):
        yield f"{name}.weight", weight
    else:
        yield name, weight


def unturned_divisors(config: Config) -> Tensor:
    """Gemma 4's full attention turns a part of each head: the other frequencies are divided away."""
    half = next(iter(config["per_layer_config"].values()))["head_dim"] // 2
    turned = int(half * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    return torch.tensor([1.0] * turned + [1e30] * (half - turned))


def delta_net_tensor(name: str, weight: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if name.endswith(".A_log"):
        weight = -torch.exp(weight)
    elif name.endswith(".dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    elif "conv1d" in name:
        weight = weight.squeeze(1)
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        weight = weight + 1
    elif name.endswith("shared_expert_gate.weight"):
        weight = weight.squeeze()
    if (
        config["model_type"] == "qwen3_5_moe_text"
        and "linear_attn." in name
        and "linear_attn.norm" not in name
    ):
        weight = tiled_value_heads(name, weight, keys, values // keys, key_dim, value_dim)
    if "in_proj_qkvz" in name:
        per_key = values // keys * value_dim
        by_key = weight.view(keys, -1, weight.shape[1]).split([key_dim, key_dim, per_key, per_key], dim=1)
        *qkv, z = [rows.reshape(-1, weight.shape[1]) for rows in by_key]
        layer = f"blk.{name.split('.')[2]}."
        yield f"{layer}attn_qkv.weight", torch.cat(qkv)
        yield f"{layer}attn_gate.weight", z
    else:
        yield name, weight


def tiled_value_heads(
    name: str, weight: Tensor, keys: int, per_key: int, key_dim: int, value_dim: int
) -> Tensor:
    """Value heads grouped by key head -> tiled over the key heads."""

    def tiled(rows: Tensor, size: int) -> Tensor:
        return rows.reshape(keys, per_key, size, -1).transpose(0, 1).reshape(rows.shape)

    if "in_proj_qkv" in name or "conv1d" in name:
        first = 2 * keys * key_dim
        return torch.cat([weight[:first], tiled(weight[first:], value_dim)])
    if "out_proj" in name:
        return tiled(weight.T, value_dim).T
    return tiled(weight, value_dim if "in_proj_z" in name else 1)


def gemma4_tensor(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    if name.endswith("router.scale"):
        yield f"{layer}ffn_gate_inp.scale", weight
    elif name.endswith("per_expert_scale"):
        yield f"{layer}ffn_down_exps.scale", weight
    elif ".experts." in name or name.endswith("layer_scalar"):
        yield f"{name}.weight", weight
    else:
        yield name, weight
