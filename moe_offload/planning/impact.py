"""Which predicted experts are worth a copy to the device first: those that would save the most time there.

HybriMoE's idea (arXiv 2504.05897, section 4): judge a copy by the layer's finishing time with and without
it. With a token's experts costing the same, that time depends on how many the device has; a layer that lacks
them gains more from one more than a layer that the device is busy with anyway. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_offload.planning.prefetch_plan import Guess


def by_impact(
    guesses: Sequence[Guess], expected: Mapping[int, float], savings: Mapping[int, Sequence[float]]
) -> list[Guess]:
    """Return the guesses that save time, those first that are expected to save the most.

    Each one chosen leaves less to gain in its layer for the next.

    Args:
        expected: by layer, how many of the experts that it will choose the device probably has.
        savings: by layer, token_moves.savings_of.
    """
    on_device, left, ranked = dict(expected), list(guesses), list[Guess]()
    while left:
        layers = [guess.key.layer_idx for guess in left]
        saved_s = [
            guess.probability * _at(savings[i], on_device[i]) for guess, i in zip(left, layers, strict=True)
        ]
        best = max(range(len(left)), key=saved_s.__getitem__)
        if saved_s[best] <= 0.0:
            break
        chosen = left.pop(best)
        on_device[chosen.key.layer_idx] += chosen.probability
        ranked.append(chosen)
    return ranked


def _at(savings: Sequence[float], residents: float) -> float:
    """Return what one more saves, between whole numbers on a straight line; nothing beyond the end."""
    below = int(residents)
    if below >= len(savings):
        return 0.0
    above = savings[below + 1] if below + 1 < len(savings) else 0.0
    return savings[below] + (residents - below) * (above - savings[below])
