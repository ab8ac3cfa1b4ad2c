"""The families of models: what each model_type calls its numbers, and what a token costs in it.

One ``Family`` per model_type; a test holds the table equal to the classes of the tested transformers
version. family_layers.py has what differs by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moe_offload.errors import CheckpointError
from moe_offload.storage.config_view import MAX_EXPERTS
from moe_offload.storage.family_layers import (
    PerLayer,
    after_dense_layers,
    all_layers,
    any_kv,
    attention_kv,
    delta_net_state,
    ernie_layers,
    gemma4_kv,
    gemma4_layers,
    hybrid_kv,
    latent_kv,
    listed_sparse_layers,
    mamba2_state,
    no_state,
    short_conv_state,
    sparse_step_layers,
)


@dataclass(frozen=True)
class Family:
    """How one model_type names its numbers, and transformers' defaults for the absent ones."""

    defaults: Mapping[str, int | None]
    experts_names: tuple[str, ...] = ()  # empty for a dense family
    intermediate_name: str = "moe_intermediate_size"
    top_k_names: tuple[str, ...] = ("num_experts_per_tok",)
    moe_layers: PerLayer = all_layers
    kv_elements: PerLayer = attention_kv  # by layer, of one token
    state_elements: PerLayer = no_state  # by layer, of one sequence, however long
    transposed: bool = False  # fused matrices are stored (cols, rows)
    interleaved: bool = False  # fused gate and up rows alternate
    found_in_file: bool = False  # layers and sizes of experts are those of the tensors
    next_token_layers: int = 0  # layers after the decoder's that official files hold and nobody runs here


def _defaults(layers: int, hidden: int, heads: int, kv_heads: int | None, vocab: int, context: int,
              **others: int) -> dict[str, int | None]:  # fmt: skip
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context, **others,
    }  # fmt: skip


_LOCAL_EXPERTS = ("num_local_experts", "num_experts")
_ROUTED_EXPERTS = ("n_routed_experts", "num_experts")
_GRANITE = _defaults(32, 4096, 32, None, 32000, 2048, num_local_experts=8, num_experts_per_tok=2,
                     intermediate_size=11008)  # fmt: skip
_DELTA_NET = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "full_attention_interval": 4,
}  # fmt: skip

MOE_FAMILIES = {
    "qwen3_moe": Family(
        _defaults(24, 2048, 32, 4, 151936, 32768, num_local_experts=128, num_experts_per_tok=8,
                  moe_intermediate_size=768, decoder_sparse_step=1),
        experts_names=_LOCAL_EXPERTS,
        moe_layers=sparse_step_layers,
    ),
    "mixtral": Family(
        _defaults(32, 4096, 32, 8, 32000, 131072, num_local_experts=8, num_experts_per_tok=2,
                  intermediate_size=14336),
        experts_names=_LOCAL_EXPERTS,
        intermediate_name="intermediate_size",
    ),
    "olmoe": Family(
        _defaults(16, 2048, 16, None, 50304, 4096, num_experts=64, num_experts_per_tok=8,
                  intermediate_size=2048),
        experts_names=("num_experts", "num_local_experts"),
        intermediate_name="intermediate_size",
    ),
    "deepseek_v2": Family(
        _defaults(32, 4096, 32, None, 102400, 2048, n_routed_experts=64, moe_intermediate_size=1407,
                  first_k_dense_replace=0, kv_lora_rank=512, qk_rope_head_dim=64),
        experts_names=_ROUTED_EXPERTS,
        moe_layers=after_dense_layers("first_k_dense_replace"),
        kv_elements=latent_kv,
    ),
    "gpt_oss": Family(
        _defaults(36, 2880, 64, 8, 201088, 131072, num_local_experts=128, num_experts_per_tok=4,
                  intermediate_size=2880, head_dim=64),
        experts_names=_LOCAL_EXPERTS,
        intermediate_name="intermediate_size",
        transposed=True,
        interleaved=True,
    ),
    "qwen2_moe": Family(
        _defaults(24, 2048, 16, 16, 151936, 32768, num_experts=60, num_experts_per_tok=4,
                  moe_intermediate_size=1408, decoder_sparse_step=1),
        experts_names=("num_experts", "num_local_experts"),
        moe_layers=sparse_step_layers,
    ),
    "deepseek_v3": Family(
        _defaults(61, 7168, 128, 128, 129280, 4096, n_routed_experts=256, num_experts_per_tok=8,
                  moe_intermediate_size=2048, first_k_dense_replace=3, kv_lora_rank=512, qk_rope_head_dim=64),
        experts_names=(*_ROUTED_EXPERTS, "num_local_experts"),
        moe_layers=after_dense_layers("first_k_dense_replace"),
        kv_elements=latent_kv,
        next_token_layers=1,
    ),
    "granitemoe": Family(_GRANITE, experts_names=_LOCAL_EXPERTS, intermediate_name="intermediate_size"),
    "granitemoeshared": Family(_GRANITE, experts_names=_LOCAL_EXPERTS, intermediate_name="intermediate_size"),
    "granitemoehybrid": Family(
        {**_GRANITE, "mamba_expand": 2, "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_d_conv": 4,
         "full_attention_interval": MAX_EXPERTS},  # all layers are linear where layer_types is absent
        experts_names=_LOCAL_EXPERTS,
        intermediate_name="intermediate_size",
        kv_elements=hybrid_kv,
        state_elements=mamba2_state,
    ),
    "phimoe": Family(
        _defaults(32, 4096, 32, 8, 32064, 131072, num_local_experts=16, num_experts_per_tok=2,
                  intermediate_size=6400),
        experts_names=_LOCAL_EXPERTS,
        intermediate_name="intermediate_size",
    ),
    "glm4_moe": Family(
        _defaults(46, 4096, 96, 8, 151552, 131072, n_routed_experts=128, num_experts_per_tok=8,
                  moe_intermediate_size=1408, first_k_dense_replace=1),
        experts_names=(*_ROUTED_EXPERTS, "num_local_experts"),
        moe_layers=after_dense_layers("first_k_dense_replace"),
        next_token_layers=1,
    ),
    "glm4_moe_lite": Family(
        _defaults(47, 2048, 20, 20, 154880, 202752, n_routed_experts=64, num_experts_per_tok=4,
                  moe_intermediate_size=1536, kv_lora_rank=512, qk_rope_head_dim=64),
        experts_names=(*_ROUTED_EXPERTS, "num_local_experts"),
        moe_layers=listed_sparse_layers,
        kv_elements=latent_kv,
        next_token_layers=1,
    ),
    "qwen3_next": Family(
        _defaults(48, 2048, 16, 2, 151936, 32768, num_experts=512, num_experts_per_tok=10, head_dim=256,
                  moe_intermediate_size=512, decoder_sparse_step=1, **_DELTA_NET),
        experts_names=("num_experts", "num_local_experts"),
        moe_layers=sparse_step_layers,
        kv_elements=hybrid_kv,
        state_elements=delta_net_state,
    ),
    "qwen3_5_moe_text": Family(
        _defaults(40, 2048, 16, 2, 248320, 32768, num_experts=256, num_experts_per_tok=8, head_dim=256,
                  moe_intermediate_size=512, **_DELTA_NET),
        experts_names=("num_experts", "num_local_experts"),
        kv_elements=hybrid_kv,
        state_elements=delta_net_state,
    ),
    "gemma4_text": Family(
        _defaults(30, 2304, 8, 4, 262144, 131072, head_dim=256),
        experts_names=("num_experts", "num_local_experts"),
        top_k_names=("top_k_experts", "num_experts_per_tok"),
        moe_layers=gemma4_layers,
        kv_elements=gemma4_kv,
    ),
    "lfm2_moe": Family(
        _defaults(32, 2048, 32, 8, 65536, 128000, num_experts=32, num_experts_per_tok=4,
                  moe_intermediate_size=1792, num_dense_layers=2, conv_L_cache=3),
        experts_names=("num_experts", "num_local_experts"),
        moe_layers=after_dense_layers("num_dense_layers"),
        kv_elements=hybrid_kv,
        state_elements=short_conv_state,
    ),
    "ernie4_5_moe": Family(
        _defaults(28, 2560, 20, 4, 103424, 131072, moe_num_experts=64, moe_k=6, moe_intermediate_size=1536,
                  moe_layer_start_index=1, moe_layer_interval=1),
        experts_names=("moe_num_experts", "num_experts"),
        top_k_names=("moe_k", "num_experts_per_tok"),
        moe_layers=ernie_layers,
    ),
    "minimax_m2": Family(
        _defaults(62, 3072, 48, 8, 200064, 196608, num_local_experts=256, num_experts_per_tok=8, head_dim=128,
                  intermediate_size=1536),
        experts_names=_LOCAL_EXPERTS,
        intermediate_name="intermediate_size",
    ),
}  # fmt: skip
DENSE_FAMILIES = {
    "llama": Family(_defaults(32, 4096, 32, None, 32000, 2048)),
    "mistral": Family(_defaults(32, 4096, 32, 8, 32000, 131072)),
    "qwen2": Family(_defaults(32, 4096, 32, 32, 151936, 32768)),
    "qwen3": Family(_defaults(32, 4096, 32, 32, 151936, 32768, head_dim=128)),
}


ANY_NAMES = Family(
    {},
    experts_names=("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    top_k_names=("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    kv_elements=any_kv,
    found_in_file=True,
)
# Families without a description of their own: their numbers go by one of the usual names, the rest is
# found in the files and measured. Only those that tests/walk_families.py has seen to give plain
# transformers' tokens belong here.
_SEEN_TO_PASS = (
    "afmoe", "axk1", "bailing_hybrid", "beam", "cohere2_moe", "dots1", "exaone_moe", "flex_olmo", "flint",
    "granitemoe_swa", "hunyuan_v1_moe", "hy_v3", "inkling_text", "kimi_linear", "kolibri1", "laguna",
    "mellum", "mimo_v2_flash", "minimax_m3_vl_text", "solar_open", "zaya",
)  # fmt: skip
MOE_FAMILIES_BY_TRIAL: dict[str, Family] = {
    **dict.fromkeys(_SEEN_TO_PASS, ANY_NAMES),
    "aria_text": replace(ANY_NAMES, transposed=True),
}


def find_family(model_type: object, where: str) -> Family:
    """Return the family of a ``model_type``; an unknown one is refused with the known names."""
    known = {**MOE_FAMILIES, **MOE_FAMILIES_BY_TRIAL, **DENSE_FAMILIES}
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            f"{where}: model_type {model_type!r:.80} is not supported; supported are "
            f"{', '.join([*MOE_FAMILIES, *MOE_FAMILIES_BY_TRIAL])} and, with allow_dense=True, "
            f"{', '.join(DENSE_FAMILIES)}"
        )
    return known[model_type]
