"""A cache layer of running state, recurrent or of a convolution, beside kv_cache.py's keys and values."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from moe_offload.errors import ConfigError


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A layer's recurrent or convolution state: one size for any number of tokens, so never cropped."""

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing for no tokens.

        Raises:
            ConfigError: the state before the tokens is gone.
        """
        if tokens_to_remove and any(self.has_previous_state.values()):
            raise ConfigError(
                "this model keeps a running state, which cannot forget tokens again; start with a new "
                "cache (assisted generation and contrastive search need models without such layers)"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace_states(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace_states(lambda state: state[indices])

    def _replace_states(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)
