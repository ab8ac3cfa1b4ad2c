"""The class of a loaded model: its transformers class, with ``generate`` unchanged for the caller.

The subclass keeps the original's name, because pipelines look the name up. It adds the key/value
cache, chunked prompts and the lock, and refuses by name what an offloaded model cannot do.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NoReturn

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.modeling_utils import PreTrainedModel

from moe_offload.errors import ConfigError
from moe_offload.runtime.chunked_prefill import (
    constant_sizes,
    needs_chunks,
    run_in_chunks,
    sequence_shape,
)
from moe_offload.runtime.footprint import weight_bytes
from moe_offload.runtime.offload import OffloadHandle

CPU = torch.device("cpu")
# transformers' caches that could not hold what they promise, and what to do instead.
NO_CARD = "keys and values are in the budget of ram=, and there is no card to move them from"
OTHER_CACHES = {
    **dict.fromkeys(
        ("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"), NO_CARD
    ),
    "quantized": 'load the model with kv="q8_0", which keeps keys and values in 8 bits within the budget',
}


@functools.cache
def offloaded_class(model_class: Any) -> Any:
    """Return the subclass of ``model_class`` that a loaded model gets."""
    forward = _make_forward(model_class)
    namespace = {
        "forward": forward,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (OffloadedModel, model_class), namespace)


def _make_forward(model_class: type[PreTrainedModel]) -> Any:
    """Wrap the family's forward; ``wraps`` keeps the signature that generate() inspects."""
    signature = inspect.signature(model_class.forward)
    names = signature.parameters.keys() - {"self", "kwargs"}

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = kwargs
        if args or not kwargs.keys() <= names:
            arguments = signature.bind_partial(self, *args, **kwargs).arguments
            arguments.pop("self")
            others = arguments.pop("kwargs", {})
            inputs = {**arguments, **others}
        with self.offload.exclusive():
            return _run_forward(self, functools.partial(model_class.forward, self), inputs)

    reason = "moe_offload experts move between tiers; call without fullgraph=True"
    run_outside_graphs: Any = torch.compiler.disable(run, reason=reason)  # type: ignore[no-untyped-call]

    @functools.wraps(model_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_outside_graphs(self, *args, **kwargs)

    return forward


def _run_forward(model: Any, forward: Any, inputs: dict[str, Any]) -> Any:
    """Give the call our cache where it wants one, and chunks where it is long."""
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        return forward(**inputs)  # transformers raises its own error
    handle: OffloadHandle = model.offload
    _make_ids_long(inputs)
    wants_tuple = inputs.pop("return_dict", None) is False
    batch_size, num_tokens = sequence_shape(inputs)
    cache = inputs.get("past_key_values")
    use_cache = inputs.get("use_cache")
    keep_cache = getattr(model.config, "use_cache", True) if use_cache is None else use_cache
    in_chunks = needs_chunks(inputs)
    if cache is None and (keep_cache or in_chunks):
        cache = inputs["past_key_values"] = handle.new_cache(num_tokens, batch_size)
    handle.room.check(num_tokens, batch_size, cache)
    handle.begin_chunk(0, num_tokens, num_tokens)
    is_new_text = cache is None or cache.get_seq_length() == 0
    if is_new_text:
        handle.check_files()
    with handle.step(batch_size * num_tokens, inputs.get("input_ids"), is_new_text=is_new_text):
        compute = functools.partial(_natively_or_in_layers, handle, forward)
        if in_chunks:
            output = run_in_chunks(compute, inputs, cache, _chunk_sizes(handle, inputs), handle.begin_chunk)
        else:
            output = compute(**inputs)
    if in_chunks and not keep_cache:
        output = type(output)(**{**output, "past_key_values": None})
    return output.to_tuple() if wants_tuple else output


def _make_ids_long(inputs: dict[str, Any]) -> None:
    """Widen 32-bit ids, which transformers takes as well; ids go to native code by address."""
    ids = inputs.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.dtype is torch.int32:
        inputs["input_ids"] = ids.long()
    elif isinstance(ids, torch.Tensor) and ids.dtype is not torch.int64:
        raise ConfigError(f"input_ids must be of torch.int64 or torch.int32, got {ids.dtype}")


def _chunk_sizes(handle: OffloadHandle, inputs: dict[str, Any]) -> list[int]:
    if handle.native_step is not None and handle.native_step.serves(inputs):
        return handle.native_step.chunk_sizes(sequence_shape(inputs)[1])
    return constant_sizes(inputs)


def _natively_or_in_layers(handle: OffloadHandle, forward: Any, **inputs: Any) -> Any:
    """Compute a chunk in native code where it serves it, else by transformers' layers."""
    if handle.native_step is not None and handle.native_step.serves(inputs):
        return handle.native_step.run(inputs)
    return forward(**inputs)


def _refuse(what: str, remedy: str) -> NoReturn:
    raise ConfigError(f"{what} is not possible on an offloaded model: {remedy}")


class OffloadedModel(PreTrainedModel):  # type: ignore[misc]
    """Mix-in of what every family shares; see the module's docstring."""

    offload: OffloadHandle

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; one generation at a time per model.

        Raises:
            BudgetError: prompt and new tokens need more key/value cache than was budgeted.
            CheckpointError: a file of the checkpoint was written to, before or meanwhile.
            ConfigError: compilation, or a cache of a kind that lies elsewhere, was asked for.
        """
        config = kwargs.get("generation_config")
        if kwargs.get("compile_config") or getattr(config, "compile_config", None):
            _refuse("compile_config", "generate without it")
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if isinstance(prompt, torch.Tensor) and prompt.numel() == 0:
            raise ConfigError(f"the prompt is empty: input_ids has shape {tuple(prompt.shape)}")
        with self.offload.exclusive():
            self.offload.check_files()
            result = super().generate(*args, **kwargs)
            self.offload.check_files()
            return result

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any,
        batch_size: int, max_cache_length: int,
    ) -> Any:  # fmt: skip
        """Put our cache where transformers would make a DynamicCache; honour the caller's own."""
        kind = generation_config.cache_implementation
        if kind in OTHER_CACHES:
            _refuse(f"cache_implementation={kind!r}", OTHER_CACHES[kind])
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            rows = batch_size * max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            if kind in (None, "dynamic"):
                model_kwargs["past_key_values"] = self.offload.new_cache(max_cache_length, rows)
                return None
            self.offload.room.check(max_cache_length, rows, None)  # a static cache is allocated whole
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep prompt lookup's guesses within the length asked for: the cache has no room beyond."""
        generator = super()._get_candidate_generator(generation_config, *args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            guess, end = generator.get_candidates, generation_config.max_length - 1

            def guess_within(input_ids: torch.Tensor, **how: Any) -> tuple[torch.Tensor, None]:
                return guess(input_ids, **how)[0][:, : max(end, input_ids.shape[1])], None

            generator.get_candidates = guess_within
        return generator

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what ``generate_batch`` and transformers' server begin with."""
        _refuse("continuous batching", "one generation runs at a time; pass generate() a padded batch")

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes that the model holds: dense weights, expert slots and key/value caches.

        Slots count whole, whether an expert has been read into them or not; experts on disk do not.
        """
        return weight_bytes(self, buffers=return_buffers) + self.offload.memory_bytes()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Accept where the model already is; refuse anything else."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and torch.device(device).type != "cpu":
            _refuse(
                f"to({str(device)!r})",
                "its memory is placed by the budget; load it again with from_pretrained",
            )
        return self._keep_dtype(dtype)

    def _keep_dtype(self, dtype: torch.dtype | None) -> Any:
        if dtype is not None and dtype != self.config.dtype:
            _refuse(f"converting to {dtype}", f"call from_pretrained(..., dtype={dtype})")
        return self

    @property
    def device(self) -> torch.device:
        """Where its tensors are; transformers looks for the first parameter, at each token."""
        return CPU

    def cpu(self) -> Any:
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what every other way to move or convert all tensors comes down to."""
        _refuse(
            "moving or converting all its tensors", "load it as it is to be: from_pretrained(..., dtype=)"
        )

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("cuda()", "its memory is placed by the budget; load it again with from_pretrained")

    def half(self, *args: Any) -> Any:
        return self._keep_dtype(torch.float16)

    def float(self, *args: Any) -> Any:
        return self._keep_dtype(torch.float32)

    def bfloat16(self) -> Any:
        return self._keep_dtype(torch.bfloat16)

    def double(self) -> Any:
        return self._keep_dtype(torch.float64)

    def train(self, mode: bool = True) -> Any:
        if mode:
            _refuse("train()", "train with transformers, then load the result here")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            _refuse("requires_grad_()", "train with transformers, then load the result here")
        return super().requires_grad_(False)

    def enable_input_require_grads(self) -> None:
        _refuse("enable_input_require_grads()", "train with transformers, then load the result here")

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("compile()", "run it as it is; a compiled graph cannot wait for experts")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        _refuse("save_pretrained()", "its experts were never loaded; copy the checkpoint files instead")

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("add_adapter()", "merge the adapter into the checkpoint first")

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("load_adapter()", "merge the adapter into the checkpoint first")

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("set_experts_implementation()", "its experts are read on demand by moe_offload's own")

    def set_adapter(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("set_adapter()", "merge the adapter into the checkpoint first")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("push_to_hub()", "its experts were never loaded; upload the checkpoint files instead")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("gradient_checkpointing_enable()", "train with transformers, then load the result here")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        _refuse("resize_token_embeddings()", "resize with transformers and save, then load the result here")

    def __deepcopy__(self, memo: Any) -> Any:
        _refuse("deepcopy", "call from_pretrained again; two models in a process share the memory budget")

    def __reduce_ex__(self, protocol: Any) -> Any:
        _refuse("pickling or copying", "send the path and call from_pretrained in the other process")
