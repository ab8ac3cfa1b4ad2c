"""What differs by layer in a family: which layers have experts, and what each caches of a token.

Key/value and state sizes, in elements, are what transformers caches, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_offload.errors import CheckpointError
from moe_offload.storage.config_view import ConfigView

PerLayer = Callable[[ConfigView, int], tuple[int, ...]]


def all_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    return tuple(range(num_layers))


def sparse_step_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    dense = view.indices("mlp_only_layers", num_layers)
    step = view.integer("decoder_sparse_step")
    return tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)


def after_dense_layers(name: str) -> PerLayer:
    def layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
        return tuple(range(view.integer(name, low=0), num_layers))

    return layers


def listed_sparse_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    kinds = view.names("mlp_layer_types", num_layers) or ("dense", *["sparse"] * (num_layers - 1))
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")


def gemma4_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    return tuple(range(num_layers)) if view.flag("enable_moe_block") else ()


def ernie_layers(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    last = view.optional("moe_layer_end_index", low=-1)
    last = num_layers - 1 if last in (None, -1) else last
    assert last is not None
    first, interval = view.integer("moe_layer_start_index", low=0), view.integer("moe_layer_interval")
    return tuple(
        layer for layer in range(num_layers) if first <= layer <= last and not (layer + 1) % interval
    )


def attention_elements(view: ConfigView) -> int:
    """Cached elements of one token in one layer: keys and values of every key-value head."""
    heads = view.integer("num_attention_heads")
    kv_heads = view.optional("num_key_value_heads", high=heads) or heads
    head_dim = view.optional("head_dim") or view.integer("hidden_size") // heads
    if head_dim < 1 or heads % kv_heads:
        raise CheckpointError(
            f"{view.where}: num_attention_heads={heads}, num_key_value_heads={kv_heads} and "
            f"head_dim={head_dim} do not fit together"
        )
    return 2 * kv_heads * head_dim


def attention_kv(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    return tuple(attention_elements(view.of_layer(layer)) for layer in range(num_layers))


def latent_kv(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    """DeepSeek caches the compressed latent and the shared rotary key."""
    return (view.integer("kv_lora_rank") + view.integer("qk_rope_head_dim"),) * num_layers


def layer_types(view: ConfigView, num_layers: int) -> tuple[str, ...]:
    """Return what each layer attends with; every fourth is full attention where nothing is said.

    Raises:
        CheckpointError: neither layer_types nor an interval is known for the family.
    """
    kinds = view.names("layer_types", num_layers, "layers_block_type")
    if kinds is not None:
        return kinds
    interval = view.optional("full_attention_interval")
    if interval is None:
        raise CheckpointError(f"{view.where}: layer_types is missing; it must name each layer's attention")
    return tuple(
        "linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(num_layers)
    )


def hybrid_kv(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    """Keys and values in the layers of full attention only."""
    elements = attention_elements(view)
    return tuple(elements * (kind == "full_attention") for kind in layer_types(view, num_layers))


def gemma4_kv(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    """Full attention has a head size of its own; the last layers may use the keys of earlier ones."""
    kinds = view.names("layer_types", num_layers) or tuple(
        "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(num_layers)
    )
    kinds = (*kinds[:-1], "full_attention")
    owners = num_layers - (view.optional("num_kv_shared_layers", low=0) or 0)
    full: dict[str, int] = {}
    if "per_layer_config" not in view.config:
        full["head_dim"] = view.optional("global_head_dim") or 512
        kv_heads = view.optional("num_global_key_value_heads")
        if kv_heads is not None and view.flag("attention_k_eq_v"):
            full["num_key_value_heads"] = kv_heads
    full_view = ConfigView({**view.config, **full}, view.defaults, view.where)
    return tuple(
        attention_elements((full_view if kind == "full_attention" else view).of_layer(layer))
        * (layer < owners)
        for layer, kind in enumerate(kinds)
    )


def no_state(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    return (0,) * num_layers


def linear_layers(view: ConfigView, num_layers: int, elements: int) -> tuple[int, ...]:
    kinds = layer_types(view, num_layers)
    return tuple(elements * (kind in ("linear_attention", "conv")) for kind in kinds)


def delta_net_state(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    """Gated delta net: the last inputs of the convolution and a matrix for each value head."""
    key_dim, value_dim = view.integer("linear_key_head_dim"), view.integer("linear_value_head_dim")
    key_heads, value_heads = view.integer("linear_num_key_heads"), view.integer("linear_num_value_heads")
    conv_dim = 2 * key_dim * key_heads + value_dim * value_heads
    conv = conv_dim * view.integer("linear_conv_kernel_dim")
    return linear_layers(view, num_layers, conv + value_heads * key_dim * value_dim)


def mamba2_state(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    inner = view.integer("mamba_expand") * view.integer("hidden_size")
    state = view.integer("mamba_d_state")
    conv = (inner + 2 * view.integer("mamba_n_groups") * state) * view.integer("mamba_d_conv")
    return linear_layers(view, num_layers, conv + inner * state)


def short_conv_state(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    return linear_layers(view, num_layers, view.integer("hidden_size") * view.integer("conv_L_cache"))


def any_kv(view: ConfigView, num_layers: int) -> tuple[int, ...]:
    """What most families cache; loading measures it (runtime/skeleton.py)."""
    known = latent_kv if view.config.get("kv_lora_rank") else attention_kv
    return known(view, num_layers)
