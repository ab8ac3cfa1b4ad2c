"""A chunk's experts cut into native calls, which changes no bit: a token's experts stay in ascending order.

No call is so long that Ctrl-C would wait for it, and an expert that thousands of tokens chose comes in
pieces, whose intermediates are all that is kept of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moe_offload.planning.prompt_chunks import EXPERT_PAIRS

CALL_MACS = 10**11  # multiply-adds of a call: half a second on two cores

Pieces = tuple[NDArray[np.intp], NDArray[np.int32]]  # (n,) positions of experts; (n + 1,) pair offsets


def expert_calls(pair_offsets: NDArray[np.int32], pair_macs: int) -> Iterator[Pieces]:
    """Yield which experts a call computes, and for which pairs.

    Args:
        pair_offsets: (n + 1,), as in ``executor.Routing``; needs not begin at 0.
        pair_macs: multiply-adds of one pair.
    """
    if int(pair_offsets[-1]) - int(pair_offsets[0]) <= EXPERT_PAIRS:
        yield np.arange(len(pair_offsets) - 1), pair_offsets
        return
    positions, offsets = in_pieces(pair_offsets, EXPERT_PAIRS)
    most_pairs = max(EXPERT_PAIRS, CALL_MACS // max(1, pair_macs))
    start = 0
    while start < len(positions):
        end = int(np.searchsorted(offsets, offsets[start] + most_pairs, side="right")) - 1
        yield positions[start:end], offsets[start : end + 1]
        start = end


def in_pieces(pair_offsets: NDArray[np.int32], most: int) -> Pieces:
    """Cut the pairs of each expert into even pieces of at most ``most``."""
    counts = np.diff(pair_offsets)
    pieces = -(-counts // most)
    positions = np.repeat(np.arange(len(counts)), pieces)
    numbers = np.arange(len(positions)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = pair_offsets[positions] + counts[positions].astype(np.int64) * numbers // pieces[positions]
    return positions, np.append(starts, pair_offsets[-1]).astype(np.int32)
