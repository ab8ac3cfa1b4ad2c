"""Linear and Embedding whose weight stays in its packed ggml blocks.

The weight is a uint8 Parameter of (rows, row bytes), so tying, moving between modules and loading
through transformers work as for any other parameter, and nothing is ever dequantized whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_offload import ops
from moe_offload.storage.expert_format import WeightType, row_bytes


def packed_weight(ggml_type: WeightType, rows: int, cols: int) -> nn.Parameter:
    """Return an uninitialised packed weight on the current default device."""
    return nn.Parameter(torch.empty(rows, row_bytes(ggml_type, cols), dtype=torch.uint8), requires_grad=False)


class QuantLinear(nn.Module):
    """``nn.Linear`` over packed blocks, in arithmetic v1 (a row's result ignores its neighbours)."""

    def __init__(self, in_features: int, out_features: int, ggml_type: WeightType, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.ggml_type = in_features, out_features, ggml_type
        self.weight = packed_weight(ggml_type, out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the input's dtype."""
        flat = hidden_states.reshape(-1, self.in_features).float().contiguous()
        bias = None if self.bias is None else self.bias.float()
        out = ops.linear(flat, self.weight, self.ggml_type, self.out_features, self.in_features, bias)
        return out.to(hidden_states.dtype).view(*hidden_states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.ggml_type.name}"


class QuantEmbedding(nn.Module):
    """``nn.Embedding`` over packed blocks: only the rows asked for are dequantized."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, ggml_type: WeightType, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.ggml_type = num_embeddings, embedding_dim, ggml_type
        self.dtype = dtype
        self.weight = packed_weight(ggml_type, num_embeddings, embedding_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) token ids -> (..., embedding_dim)."""
        rows = ops.embedding_rows(
            input_ids.reshape(-1), self.weight, self.ggml_type, self.num_embeddings, self.embedding_dim
        )
        return rows.to(self.dtype).view(*input_ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.ggml_type.name}"


class ScaledQuantEmbedding(QuantEmbedding):
    """A packed embedding whose rows are multiplied by a constant (Gemma)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ggml_type: WeightType,
        dtype: torch.dtype,
        scale: float,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, ggml_type, dtype)
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        """(...) token ids -> (..., embedding_dim)."""
        rows = super().forward(input_ids)
        return rows * torch.tensor(self.scale, dtype=rows.dtype)
