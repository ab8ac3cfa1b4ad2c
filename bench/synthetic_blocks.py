"""Blocks of random weights for make_synthetic.py: random bytes, and the constant scales that they need."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

# Where a block keeps its float16 scales (ggml's block structs): (byte offset, factor). The second scale of
# Q4_K and Q5_K multiplies the mins; its factor centres the weights: the mean of the quants.
SCALES = {
    Type.Q4_0: ((0, 1.0),),
    Type.Q5_0: ((0, 1.0),),
    Type.Q8_0: ((0, 1.0),),
    Type.Q4_K: ((0, 1.0), (2, 7.5)),
    Type.Q5_K: ((0, 1.0), (2, 15.5)),
    Type.Q6_K: ((208, 1.0),),
}


def random_blocks(num_blocks: int, block_bytes: int, rng: np.random.Generator) -> np.ndarray:
    """Return (num_blocks, block_bytes) random bytes."""
    words = rng.integers(0, 2**64, size=num_blocks * block_bytes // 8 + 1, dtype=np.uint64)
    return words.view(np.uint8)[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)


def block_scales(tensor_type: Type, spread: float) -> list[tuple[int, float]]:
    """Return the scales that give random blocks weights with standard deviation ``spread``."""
    sample = random_blocks(512, gguf.GGML_QUANT_SIZES[tensor_type][1], np.random.default_rng(0))
    set_scales(sample, list(SCALES[tensor_type]))
    unit = float(gguf.dequantize(sample, tensor_type).std())
    return [(offset, factor * spread / unit) for offset, factor in SCALES[tensor_type]]


def set_scales(blocks: np.ndarray, scales: list[tuple[int, float]]) -> None:
    for offset, scale in scales:
        blocks[:, offset : offset + 2] = np.array([scale], dtype=np.float16).view(np.uint8)
