"""The native decode step: its operations against PyTorch in float64, whole models against transformers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_models
from toy_models import plain_model, save_model, save_toy_model
from transformers import CONFIG_MAPPING, AttentionInterface
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moe_offload
from moe_offload import ConfigError, _native, ops
from moe_offload.config import DEMO_MODEL
from moe_offload.planning.policies.horizon import HorizonPolicy
from moe_offload.runtime.kv_cache import KVCache
from moe_offload.runtime.native_families import native_step_reason
from moe_offload.runtime.native_step import maker_of
from moe_offload.runtime.packed_kv import pack, unpack
from moe_offload.storage.checkpoint import open_checkpoint

VOCAB = 11


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def linear(weight, bias=None):
    """A float32 matrix as the native step takes it."""
    return (0, *weight.shape, weight.data_ptr(), weight.nbytes, address(bias))


class OneLayer:
    """A dense layer of chosen shape around random weights, in float64 by PyTorch and natively."""

    def __init__(
        self, heads=4, kv_heads=2, head_dim=16, rotary_dim=16, cache_dtype=torch.float32, hidden=24, **traits
    ):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.cache_dtype, self.traits = cache_dtype, traits
        torch.manual_seed(4)
        self.hidden = hidden
        size, kv_size = heads * head_dim, kv_heads * head_dim
        shapes = {
            "embedding": (VOCAB, hidden), "head": (VOCAB, hidden), "query": (size, hidden),
            "key": (kv_size, hidden), "value": (kv_size, hidden), "out": (hidden, size),
            "gate": (20, hidden), "up": (20, hidden), "down": (hidden, 20),
            "norm": (hidden,), "feed_forward_norm": (hidden,), "final_norm": (hidden,),
            "q_norm": (head_dim if traits.get("norms_heads", True) else size,),
            "k_norm": (head_dim if traits.get("norms_heads", True) else kv_size,),
            "sinks": (heads,), "query_bias": (size,), "out_bias": (hidden,),
        }  # fmt: skip
        self.w = {name: torch.randn(shape) * (0.4 if len(shape) > 1 else 1) for name, shape in shapes.items()}
        self.cos, self.sin = torch.randn(2, rotary_dim // 2)
        self.half = rotary_dim // 2

    def has(self, name):
        return self.traits.get(name, False)

    def linear(self, name, bias=None):
        return linear(self.w[name], bias)

    def described(self):
        """The shape, final norm and head, attention, and the dense network: kernel and addresses."""
        w = self.w
        shape = {
            "hidden_size": self.hidden, "num_heads": self.heads, "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim, "rotary_dim": 2 * self.half, "eps": 1e-6,
            "scaling": self.head_dim**-0.5, "max_top_k": 0,
            "cache_type": {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30, None: 8}[self.cache_dtype],
        }  # fmt: skip
        attention = {
            "norm": address(w["norm"]),
            "query": self.linear("query", w["query_bias"] if self.has("bias") else None),
            "key": self.linear("key"),
            "value": self.linear("value", w.get("value_bias")),
            "out": self.linear("out", w["out_bias"] if self.has("bias") else None),
            "q_norm": address(w["q_norm"]) if self.has("qk_norm") else 0,
            "k_norm": address(w["k_norm"]) if self.has("qk_norm") else 0,
            "norms_heads": self.traits.get("norms_heads", True),
            "clip": self.traits.get("clip", 0.0),
            "window": self.traits.get("window", 0),
            "sinks": address(w["sinks"]) if self.has("sinks") else 0,
            "feed_forward_norm": address(w["feed_forward_norm"]),
        }
        matrices = [self.linear(name) for name in ("gate", "up", "down")]
        formats = [(*matrix[:3], False) for matrix in matrices]
        kernel = _native.ExpertKernel(formats, 2, 1, 0, 0.0, 0.0, 0, 0)
        return SimpleNamespace(
            shape=shape, final_norm=address(w["final_norm"]), head=self.linear("head"), attention=attention,
            kernel=kernel, addresses=[matrix[3] for matrix in matrices],
        )  # fmt: skip

    def step(self):
        layer = self.described()
        step = _native.DecodeStep(layer.shape, self.linear("embedding"), layer.final_norm, layer.head)
        step.add_dense_layer(layer.attention, layer.kernel, layer.addresses)
        return step

    def native(self, token, keys, values, num_tokens):
        """Append to (kv_heads, capacity, head_dim) keys and values; return the logits."""
        step = self.step()
        step.begin(token, address(self.cos), address(self.sin))
        step.attend(0, address(keys), address(values), keys.shape[1], num_tokens)
        logits = torch.empty(VOCAB)
        step.logits(address(logits))
        return logits

    def norm(self, x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.w[name].double()

    def heads_of(self, x, norm, count):
        x = self.norm(x, norm) if self.has("qk_norm") and not self.traits.get("norms_heads", True) else x
        x = x.view(count, self.head_dim)
        x = self.norm(x, norm) if self.has("qk_norm") and self.traits.get("norms_heads", True) else x
        x = self.clip(x)
        a, b, rest = x[:, : self.half], x[:, self.half : 2 * self.half], x[:, 2 * self.half :]
        cos, sin = self.cos.double(), self.sin.double()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def clip(self, x):
        return x.clamp(-self.traits["clip"], self.traits["clip"]) if self.has("clip") else x

    def reference(self, token, keys, values, num_tokens):
        """The same in float64; the new key and value are rounded to the cache's dtype."""
        w = {name: tensor.double() for name, tensor in self.w.items()}
        x = w["embedding"][token]
        normed = self.norm(x, "norm")
        query = w["query"] @ normed + (w["query_bias"] if self.has("bias") else 0)
        query = self.heads_of(query, "q_norm", self.heads)
        key = self.heads_of(w["key"] @ normed, "k_norm", self.kv_heads).to(self.cache_dtype)
        value = self.clip((w["value"] @ normed).view(self.kv_heads, -1)).to(self.cache_dtype)
        keys = torch.cat([keys[:, :num_tokens], key[:, None]], 1).double()
        values = torch.cat([values[:, :num_tokens], value[:, None]], 1).double()
        if self.has("window"):
            keys, values = keys[:, -self.traits["window"] :], values[:, -self.traits["window"] :]
        group = self.heads // self.kv_heads
        scores = torch.einsum("hd,htd->ht", query, keys.repeat_interleave(group, 0)) * self.head_dim**-0.5
        sinks = w["sinks"][:, None] if self.has("sinks") else torch.full((self.heads, 1), -torch.inf)
        weights = torch.cat([scores, sinks], 1).softmax(-1)[:, :-1]
        context = torch.einsum("ht,htd->hd", weights, values.repeat_interleave(group, 0)).reshape(-1)
        x = x + w["out"] @ context + (w["out_bias"] if self.has("bias") else 0)
        normed = self.norm(x, "feed_forward_norm")
        x = x + w["down"] @ (torch.nn.functional.silu(w["gate"] @ normed) * (w["up"] @ normed))
        return w["head"] @ self.norm(x, "final_norm")


LAYERS = {
    "plain": {},
    "one head per key": {"heads": 3, "kv_heads": 3},
    "seven heads per key": {"heads": 7, "kv_heads": 1, "head_dim": 8, "rotary_dim": 8},
    "part of a head rotated": {"rotary_dim": 6},
    "norms of heads": {"qk_norm": True},
    "norms of all heads": {"qk_norm": True, "norms_heads": False},
    "bias and sinks": {"bias": True, "sinks": True},
    "clipped": {"clip": 0.5},
    "window": {"window": 5},
    "window beyond a range": {"window": 300, "sinks": True},
    "wide heads": {"heads": 4, "kv_heads": 1, "head_dim": 72},
    "float16 cache": {"cache_dtype": torch.float16},
    "bfloat16 cache": {"cache_dtype": torch.bfloat16, "heads": 2, "kv_heads": 1, "head_dim": 40},
}


@pytest.mark.parametrize("num_tokens", [0, 1, 6, 255, 256, 700])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_float64(name, num_tokens):
    layer = OneLayer(**LAYERS[name])
    keys, values = torch.randn(2, layer.kv_heads, num_tokens + 1, layer.head_dim).to(layer.cache_dtype)
    expected = layer.reference(3, keys, values, num_tokens)
    actual = layer.native(3, keys, values, num_tokens)
    tolerance = 2e-6 if layer.cache_dtype == torch.float32 else 1e-2  # a rounding of the new key may differ
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max()
    )


def layer_bits(num_threads, isa):
    before = ops.num_threads()
    layer = OneLayer(heads=28, kv_heads=4, head_dim=64, rotary_dim=64, sinks=True, qk_norm=True)
    torch.manual_seed(7)
    keys, values = torch.randn(2, 4, 1000, 64)
    try:
        ops.set_num_threads(num_threads)
        _native.force_isa(isa)
        logits = layer.native(2, keys, values, 999)
    finally:
        ops.set_num_threads(before)
        _native.force_isa("")
    return logits, keys, values


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_and_instruction_sets_give_the_same_bits(num_threads, isa):
    expected = layer_bits(1, "baseline")
    for one, other in zip(layer_bits(num_threads, isa), expected, strict=True):
        assert torch.equal(one, other)


def attention_bits(isa, cache_dtype):
    """Logits of a layer whose new key and value are zeros, which every cache holds as they are.

    ``cache_dtype`` is "unpacked" for what a packed cache (None) says, as float32.
    """
    layer = OneLayer(
        heads=22, kv_heads=2, head_dim=96, rotary_dim=0, window=650,
        cache_dtype=torch.float32 if cache_dtype == "unpacked" else cache_dtype,
    )  # fmt: skip
    layer.w["key"].zero_(), layer.w["value"].zero_()
    rows = torch.randn(2, 2, 701, 96, generator=torch.Generator().manual_seed(8))
    rows[:, :, -1] = 0.0
    if cache_dtype in ("unpacked", None):
        rows = pack(rows)
        keys, values = unpack(rows, torch.float32) if cache_dtype else rows
    else:
        keys, values = rows.to(cache_dtype)
    try:
        _native.force_isa(isa)
        return layer.native(2, keys.contiguous(), values.contiguous(), 700)
    finally:
        _native.force_isa("")


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16, None])
def test_every_cache_gives_the_same_bits_on_every_instruction_set(cache_dtype, isa):
    assert torch.equal(attention_bits(isa, cache_dtype), attention_bits("baseline", cache_dtype))


def test_a_packed_cache_gives_the_bits_of_what_it_holds():
    assert torch.equal(attention_bits("", None), attention_bits("", "unpacked"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_values_are_rounded_to_nearest_even(dtype):
    """The bias is all that the projections yield: what arrives in the cache is its rounding."""
    special = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e-8, 3e-8, 6.1e-5, 2049.0, 2051.0, 1e30, torch.inf]
    powers = torch.randint(-9, 6, (500,), generator=torch.Generator().manual_seed(5))
    numbers = torch.cat([torch.tensor(special), torch.linspace(-1.0, 1.0, 500) * 10.0**powers])
    numbers = torch.cat([numbers, -numbers, torch.zeros(-2 * len(numbers) % 8)])
    layer = OneLayer(heads=1, kv_heads=1, head_dim=len(numbers), rotary_dim=0, cache_dtype=dtype, bias=True)
    layer.w["value"].zero_()
    layer.w["value_bias"] = numbers
    keys, values = torch.zeros(2, 1, 1, len(numbers), dtype=dtype)
    layer.native(0, keys, values, 0)
    assert torch.equal(values[0, 0], numbers.to(dtype))


@pytest.mark.parametrize("change", ["top_k", "ties", "chosen", "normalized"])
def test_routing_equals_float64(change, tmp_path):
    """The choice as transformers' routers make it, ids ascending; of equals the smaller id."""
    torch.manual_seed(1)
    gate, hidden = torch.randn(19, 24), torch.randn(1, 24)
    if change == "ties":
        gate[5:] = gate[4]
    top_k = 1 if change == "top_k" else 6
    layer = OneLayer()
    shape = {
        "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rotary_dim": 16, "eps": 0.0,
        "scaling": 0.25, "max_top_k": top_k, "cache_type": 0,
    }  # fmt: skip
    w = layer.w
    zero = torch.zeros_like(w["out"])  # attention adds nothing, so the router sees the norm of the embedding
    step = _native.DecodeStep(shape, linear(hidden), address(w["final_norm"]), linear(w["head"]))
    kernel = _native.ExpertKernel([(0, 40, 24, False), (0, 24, 20, False)], 0, 19, 0, 0.0, 0.0, 0, 0)
    attention = {
        "norm": address(w["norm"]), "query": linear(w["query"]), "key": linear(w["key"]),
        "value": linear(w["value"]), "out": linear(zero), "q_norm": 0, "k_norm": 0, "norms_heads": True,
        "clip": 0.0, "window": 0, "sinks": 0, "feed_forward_norm": address(w["feed_forward_norm"]),
    }  # fmt: skip
    step.add_moe_layer(attention, linear(gate), top_k, change == "chosen", change == "normalized", kernel)
    keys, values = torch.zeros(2, 2, 1, 16)
    step.begin(0, address(layer.cos), address(layer.sin))
    step.attend(0, address(keys), address(values), 1, 0)
    ids, weights = step.choice()
    x = hidden[0].double()
    logits = gate.double() @ (x * torch.rsqrt((x * x).mean()) * w["feed_forward_norm"].double())
    order = sorted(range(19), key=lambda i: (-round(float(logits[i]), 9), i))[:top_k]
    chosen = logits[order].softmax(-1) if change == "chosen" else logits.softmax(-1)[order]
    chosen = chosen / chosen.sum() if change == "normalized" else chosen
    expected = dict(zip(order, chosen.tolist(), strict=True))
    assert ids == sorted(order)
    np.testing.assert_allclose(weights, [expected[i] for i in ids], rtol=2e-6)


FAMILIES = ("qwen3_moe", "qwen3_moe_with_dense_layers", "mixtral", "olmoe", "gpt_oss")
TRAITS = {
    "olmoe clipped": ("olmoe", {"clip_qkv": 0.3, "norm_topk_prob": True}),
    "mixtral in a window": ("mixtral", {"sliding_window": 7}),
    "qwen3_moe in a window": ("qwen3_moe", {"sliding_window": 9, "attention_bias": True}),
}


def decode(model, ids, num_prompt_tokens):
    """Logits of ``ids`` after the prompt, one forward each."""
    return toy_models.decode(model, ids, num_prompt_tokens)[1:]


def load(path, **options):
    return moe_offload.from_pretrained(path, **{"experts": "50%", "ram": "8GiB", "context": 256, **options})


@pytest.mark.parametrize("name", [*FAMILIES, *TRAITS])
def test_logits_equal_transformers_in_every_family(name, tmp_path):
    family, overrides = TRAITS.get(name, (name, {}))
    folder = save_toy_model(family, tmp_path, **overrides)
    model = load(folder)
    assert native_step_reason(open_checkpoint(folder).config) is None
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    served = count_native(model)
    actual, expected = decode(model, ids, 20), decode(plain_model(folder), ids, 20)
    assert len(served) == 1 + 20
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(decode(model, ids, 1)[19:], actual)  # a prompt's tokens have the bits of decoded ones
    assert len(served) == 1 + 20 + 40
    model.offload.close()


DENSE = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama with scaled rotary": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 7, "head_dim": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 24, "hidden_act": "gelu_pytorch_tanh"},
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_equal_transformers_natively_and_by_layers(name, tmp_path):
    sizes = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config = CONFIG_MAPPING[name.split()[0]](**sizes, **DENSE[name])
    folder = save_model(config, tmp_path)
    assert native_step_reason(open_checkpoint(folder, allow_dense=True).config) is None
    model = load(folder, experts=None, allow_dense=True)
    served = count_native(model)
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = decode(plain_model(folder), ids, 20)
    native = decode(model, ids, 20)
    assert len(served) == 1 + 20
    model.offload.native_step = None
    layered = decode(model, ids, 20)
    assert len(served) == 1 + 20
    closeness = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(native, expected, **closeness)
    torch.testing.assert_close(native, layered, **closeness)
    assert torch.equal(native.argmax(-1), layered.argmax(-1))
    model.offload.close()


def count_native(model):
    """Return a list that grows with every native step."""
    served, run = [], model.offload.native_step.run
    model.offload.native_step.run = lambda inputs: served.append(1) or run(inputs)
    return served


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_half_precision_is_as_close_to_float64_as_transformers(family, dtype, tmp_path):
    """CONTRACTS' accuracy rule: not worse than twice transformers' own error, plus a rounding."""
    experts = {"num_experts_per_tok": 6} if family == "gpt_oss" else {"num_experts_per_tok": 8}
    folder = save_toy_model(family, tmp_path, dtype, **experts)  # all experts: no choice can flip
    ids = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(2))
    exact = decode(plain_model(folder, dtype=torch.float64), ids, 1)
    theirs = decode(plain_model(folder, dtype=dtype), ids, 1)
    model = load(folder, experts="all")
    served = count_native(model)
    ours = decode(model, ids, 1)
    assert ours.dtype == dtype and len(served) == 30
    error, their_error = (ours - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error <= their_error + 1e-5
    model.offload.close()


@pytest.fixture(scope="module")
def demo():
    model = moe_offload.from_pretrained(ram="8GiB", experts="25%", context=256)
    yield model
    model.offload.close()


PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


def test_quantized_layers_give_what_they_give_in_transformers(demo, monkeypatch):
    """The same packed weights through QuantLinear: only roundings of activations may differ."""
    ids = torch.randint(3, 8000, (1, 60), generator=torch.Generator().manual_seed(2))
    native = decode(demo, ids, 10)
    monkeypatch.setattr(demo.offload, "native_step", None)
    layered = decode(demo, ids, 10)
    assert (native - layered).abs().mean() < 1e-2 * layered.std()


def test_greedy_text_of_the_demo_model_is_that_of_transformers_layers(demo):
    kwargs = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    native = demo.generate(PROMPT, **kwargs)
    step, demo.offload.native_step = demo.offload.native_step, None
    layered = demo.generate(PROMPT, **kwargs)
    demo.offload.native_step = step
    assert torch.equal(native, layered)


@pytest.mark.parametrize(
    ("weights", "tolerance"),
    # A last bit that moves an activation over a step of its 8 bits is a difference of 1 in 127.
    [("packed", 1e-2), ("float32", 3e-6)],
)
def test_counters_and_recorded_routing_are_those_of_transformers_layers(weights, tolerance, tmp_path):
    path = DEMO_MODEL if weights == "packed" else save_toy_model("qwen3_moe", tmp_path)
    prompt, seen = PROMPT % 94 + 3 if weights == "float32" else PROMPT, []
    for native in (True, False):
        model = moe_offload.from_pretrained(path, ram="8GiB", experts="25%", context=64, prefetch=False)
        if not native:
            model.offload.native_step = None
        with model.offload.trace(router_inputs=True) as recorder:
            model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        trace, stats = recorder.trace(), model.offload.stats()
        seen.append(
            (trace, [stats.hits, stats.misses, stats.evictions, stats.demand_bytes, stats.decode_steps])
        )
        model.offload.close()
    assert np.array_equal(seen[0][0].experts, seen[1][0].experts)
    np.testing.assert_allclose(seen[0][0].weights, seen[1][0].weights, rtol=tolerance)
    assert seen[0][1] == seen[1][1]


@pytest.mark.parametrize("prefetch", [False, True])
def test_residents_are_counted_when_all_layers_run_in_one_call(prefetch, monkeypatch):
    model = moe_offload.from_pretrained(ram="8GiB", experts="all", context=64, prefetch=prefetch)
    step, kwargs = model.offload.native_step, {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(PROMPT, **kwargs)
    (pool,) = model.offload.cache._pools
    counted = []
    for way in ("in one call", "layer by layer"):
        before, done, layered = model.offload.stats().as_dict(), [], []
        with monkeypatch.context() as patch:
            for executor in step._moe_executors:
                patch.setattr(executor, "on_layer_done", done.append)
            patch.setattr(pool, "policy", HorizonPolicy())
            pool._untold.clear()
            if way == "in one call":
                patch.setattr(step, "_run_layers", lambda *args, layered=layered: layered.append(args))
            else:
                patch.setattr(step, "_tables", lambda: None)
            assert torch.equal(model.generate(PROMPT, **kwargs), expected)
            (learned,) = model.offload.cache.policy_states()
        assert not layered, "a whole generation had nothing to read, and yet ran layer by layer"
        after = model.offload.stats().as_dict()
        counts = {name: after[name] - before[name] for name in ("hits", "misses", "decode_steps")}
        counted.append((counts, learned["layers"].tolist(), learned["parts"].tolist()))
        # The guard is asked after each of the prompt's layers, then after each run.
        after_a_token = [11] if way == "in one call" else list(range(12))
        assert done == [*range(12), *after_a_token * 19]
    assert counted[0] == counted[1]
    assert counted[0][1] == list(range(12)), "the policy was not told of all layers"
    assert counted[0][0]["hits"] >= 12 * 4 * 19 and counted[0][0]["misses"] == 0
    model.offload.cache.check()
    assert model.offload.cache.give_back(1) > 0  # the tables are gone with the slot
    assert torch.equal(model.generate(PROMPT, **kwargs), expected)
    model.offload.close()


@pytest.mark.parametrize("policy", ["horizon", "lru"])
def test_runs_between_misses_leave_what_layer_by_layer_leaves(policy, monkeypatch):
    """A cache of a few experts: counters, evictions, residents and the log do not tell the two ways apart."""
    left = []
    for way in ("in runs", "layer by layer"):
        model = moe_offload.from_pretrained(
            experts=8, context=64, prefetch=False, policy=policy, warm_start=False
        )
        if way == "layer by layer":
            monkeypatch.setattr(model.offload.native_step, "_tables", lambda: None)
        tokens = model.generate(PROMPT, max_new_tokens=20, do_sample=False, eos_token_id=None)
        stats, cache = model.offload.stats().as_dict(), model.offload.cache
        cache.check()
        names = ("hits", "misses", "evictions", "demand_bytes", "decode_steps")
        left.append((tokens.tolist(), [stats[n] for n in names], cache.residents(), cache.log.events()))
        model.offload.close()
    assert left[0] == left[1]
    assert left[0][1][1] and left[0][1][2], "nothing missed, or nothing had to leave"


def test_experts_read_on_the_way_join_the_run():
    """Every expert has a slot and none was read yet: the run stops and goes on."""
    model = moe_offload.from_pretrained(ram="8GiB", experts="all", context=64, prefetch=False)
    other = moe_offload.from_pretrained(ram="8GiB", experts=8, context=64, prefetch=False)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(PROMPT, **kwargs), other.generate(PROMPT, **kwargs))
    model.offload.cache.check()
    model.offload.close()
    other.offload.close()


def test_memory_given_back_in_the_middle_of_a_token_changes_nothing(monkeypatch):
    """The guard may shrink the cache after any run: its tables are old then."""
    model = moe_offload.from_pretrained(ram="8GiB", experts="all", context=64, prefetch=False)
    other = moe_offload.from_pretrained(ram="8GiB", experts="all", context=64, prefetch=False)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = other.generate(PROMPT, **kwargs)
    cache, calls = model.offload.cache, []

    def give_back(layer_idx):
        calls.append(layer_idx)
        has_stopped = len(calls) > 12 and layer_idx < 11  # an early token still reads, so its run goes on
        if has_stopped and not model.offload.stats().slots_given_back:
            assert cache.give_back(1 << 40) > 0

    for executor in model.offload.native_step._moe_executors:
        monkeypatch.setattr(executor, "on_layer_done", give_back)
    assert torch.equal(model.generate(PROMPT, **kwargs), expected)
    assert model.offload.stats().slots_given_back and calls[12:].count(11) == 19
    cache.check()
    model.offload.close()
    other.offload.close()


def step_inputs(model, **changes):
    cache = model.offload.new_cache(32)
    model(PROMPT, past_key_values=cache)
    return {"input_ids": torch.tensor([[4]]), "past_key_values": cache, "use_cache": True, **changes}


def test_what_asks_for_more_than_logits_takes_transformers_layers(demo):
    step, inputs = demo.offload.native_step, step_inputs(demo)
    assert step.serves(inputs)
    assert step.serves({**inputs, "attention_mask": torch.ones(1, 6, dtype=torch.long), "labels": None})
    refused = {
        "no tokens": {"input_ids": torch.empty(1, 0, dtype=torch.long)},
        "positions that start anew": {
            "input_ids": torch.tensor([[4, 5]]),
            "position_ids": torch.tensor([[5, 0]]),
        },
        "two sequences": {"input_ids": torch.tensor([[4], [5]])},
        "a padded mask": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        "a mask of another length": {"attention_mask": torch.ones(1, 5, dtype=torch.long)},
        "hidden states": {"output_hidden_states": True},
        "router logits": {"output_router_logits": True},
        "a loss": {"labels": torch.tensor([[4]])},
        "embeddings": {"input_ids": None, "inputs_embeds": torch.zeros(1, 1, 256)},
        "no cache": {"use_cache": False},
        "a tuple": {"return_dict": False},
        "something unknown": {"rainbow": 1},
    }
    for name, change in refused.items():
        assert not step.serves({**inputs, **change}), name


def test_hooks_and_replaced_modules_are_seen(demo):
    step, inputs = demo.offload.native_step, step_inputs(demo)
    seen = []
    attention = demo.model.layers[3].self_attn
    handle = attention.register_forward_hook(lambda *args: seen.append(1))
    demo(**inputs)
    handle.remove()
    assert seen == [1]
    projection = attention.q_proj
    attention.q_proj = torch.nn.Sequential(projection)
    assert not step.serves(inputs)
    attention.q_proj = projection
    assert step.serves(inputs)


def test_a_setting_that_changes_in_the_middle_of_a_text_is_seen(demo):
    step, inputs, config = demo.offload.native_step, step_inputs(demo), demo.config
    for name, value in (("use_cache", False), ("output_router_logits", True), ("output_hidden_states", True)):
        asked = {key: given for key, given in inputs.items() if key != "use_cache"}
        before = getattr(config, name)
        setattr(config, name, value)
        assert not step.serves(asked), name
        setattr(config, name, before)
        assert step.serves(asked), name


def test_outputs_are_those_of_transformers_own_constructors():
    logits, cache = torch.ones(1, 1, VOCAB), object()
    for output_class in (CausalLMOutputWithPast, MoeCausalLMOutputWithPast):
        made, expected = (
            maker_of(output_class)(logits, cache),
            output_class(logits=logits, past_key_values=cache),
        )
        assert type(made) is output_class
        assert list(vars(made).items()) == list(vars(expected).items())
        assert list(made.items()) == list(expected.items()) and made.to_tuple() == expected.to_tuple()


def test_what_was_noted_of_dicts_is_compared_by_identity():
    held = {"a": 1000, "b": None}
    assert _native.are_empty([{}, {}]) and not _native.are_empty([{}, held])
    assert _native.are_as_noted([held] * 3, ["a", "b", "c"], [held["a"], None, None])
    assert not _native.are_as_noted([held], ["a"], [float(1000)])
    assert not _native.are_as_noted([held], ["b"], [held["a"]])
    with pytest.raises(ConfigError, match="one length"):
        _native.are_as_noted([held], [], [])
    with pytest.raises(TypeError, match="dicts"):
        _native.are_empty([[]])


def test_one_look_at_hidden_states_does_not_end_native_steps(demo):
    """transformers hooks into the layers when it is first asked for them, and never lets go."""
    demo(PROMPT, output_hidden_states=True, output_router_logits=True)
    assert any(layer._forward_hooks for layer in demo.model.layers)
    inputs = step_inputs(demo)
    assert demo.offload.native_step.serves(inputs)
    assert not demo.offload.native_step.serves({**inputs, "output_hidden_states": True})


CHANGES = {
    "a forward of its own": lambda part: setattr(part, "forward", type(part).forward.__get__(part)),
    "a setting": lambda part: setattr(part, "scaling", 2 * part.scaling),
    "weights elsewhere": lambda part: setattr(part.q_norm.weight, "data", part.q_norm.weight.data.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_before_a_text_begins_is_seen_in_all_of_it(demo, change):
    """Libraries that steer or edit a model do it so; native code would answer as if they had not."""
    step, attention = demo.offload.native_step, demo.model.layers[3].self_attn
    demo(PROMPT, labels=PROMPT)  # transformers' layers change nothing by themselves
    assert step.serves(step_inputs(demo))
    before, weight = dict(vars(attention)), attention.q_norm.weight.data
    CHANGES[change](attention)
    inputs = step_inputs(demo)
    assert not step.serves(inputs)
    vars(attention).clear()
    vars(attention).update(before)
    attention.q_norm.weight.data = weight
    assert step.serves(step_inputs(demo))


def test_norms_changed_in_place_count_from_the_next_text_on(tmp_path):
    """Native code reads float32 copies of what is 16 bits wide."""
    folder = save_toy_model("qwen3_moe", tmp_path)
    model = moe_offload.from_pretrained(folder, ram="8GiB", context=64, dtype=torch.bfloat16)
    model(PROMPT)
    for norm in (model.model.norm, model.model.layers[1].post_attention_layernorm):
        norm.weight.data.mul_(-2)
    inputs = step_inputs(model)
    assert model.offload.native_step.serves(inputs)
    actual, expected = model(PROMPT), model(PROMPT, labels=PROMPT)  # natively, and by transformers' layers
    model.offload.close()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0.05, atol=0.05)


def test_an_attention_of_ones_own_is_called(demo):
    calls = []

    def attend(*args, **kwargs):
        calls.append(1)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    AttentionInterface.register("counted", attend)
    demo.set_attn_implementation("counted")
    demo(PROMPT)
    demo.set_attn_implementation("sdpa")
    assert len(calls) == demo.config.num_hidden_layers
    assert demo.offload.native_step.serves(step_inputs(demo))


def test_the_cache_of_another_model_is_not_written_to(tmp_path):
    """Native code goes by addresses: rows of another size would end beyond the memory."""
    folders = [
        save_toy_model("qwen3_moe", tmp_path / str(heads), num_key_value_heads=heads) for heads in (1, 2)
    ]
    one, other = (moe_offload.from_pretrained(f, ram="8GiB", context=64) for f in folders)
    cache = one(PROMPT).past_key_values
    with pytest.raises(RuntimeError, match="size"):
        other(torch.tensor([[4]]), past_key_values=cache)
    assert other.offload.native_step.serves(step_inputs(other))
    one.offload.close(), other.offload.close()


def test_an_interrupt_in_the_middle_leaves_no_part_of_the_token_in_the_cache(demo, monkeypatch):
    monkeypatch.setattr(demo.offload.prefetcher, "enabled", False)  # runs stop at whatever is not resident
    inputs = step_inputs(demo)
    expected = demo(**step_inputs(demo)).logits
    step = demo.offload.native_step
    run, calls = step._run_experts, []

    def interrupted(executor, **how):
        calls.append(executor.layer_idx)
        if executor.layer_idx == 5:
            raise KeyboardInterrupt
        run(executor, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, "_run_experts", interrupted)
        demo(**inputs)
    assert calls[-1] == 5
    demo.offload.cache.check()
    assert inputs["past_key_values"].get_seq_length() == 5
    assert torch.equal(demo(**inputs).logits, expected)


def test_a_full_cache_is_a_budget_error_as_before(demo):
    cache = KVCache(demo.offload.room.layer_types, 5)
    with pytest.raises(moe_offload.BudgetError, match="5 tokens"):
        demo(**step_inputs(demo, past_key_values=fill(demo, cache)))


def fill(model, cache):
    model(PROMPT, past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "deepseek_v2"}, "does not know model_type 'deepseek_v2'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "change with the sequence's length"),
        ({"head_dim": 20}, "not a multiple of 8"),
    ],
)
def test_a_reason_is_given_for_every_other_model(config, reason):
    base = {"model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4}
    assert native_step_reason(base) is None
    assert reason in native_step_reason({**base, **config})


def test_the_demo_model_is_native():
    assert native_step_reason(open_checkpoint(DEMO_MODEL).config) is None


def test_wrong_arguments_are_named():
    layer = OneLayer()
    keys, values = torch.zeros(2, 2, 4, 16)
    with pytest.raises(ConfigError, match=r"token_id must be in \[0, 11\), got 11"):
        layer.native(11, keys, values, 0)
    with pytest.raises(ConfigError, match="cache is full: 4 tokens"):
        layer.native(0, keys, values, 4)
    layer.w["query"] = torch.zeros(8, 24)
    with pytest.raises(ConfigError, match="rows of query must be 64, got 8"):
        layer.native(0, keys, values, 0)
