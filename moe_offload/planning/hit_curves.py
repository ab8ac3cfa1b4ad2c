"""What to expect of routing when no trace of the model is at hand: hit rates and experts used, by family.

Each curve was replayed with decayed frequency (ewma) through the runtime's own cache, one pool over
all layers, from cold (bench/cache_hit_rate.py --pool shared). Between the points it is a straight line.
"""

from __future__ import annotations

from bisect import bisect_right
from math import exp, log

Curve = tuple[tuple[float, float], ...]  # (share of the experts that is resident, hit rate), ascending

# gpt_oss: recorded decode of gpt-oss-20b, 12,186 tokens of 29 sequences, top 4 of 32.
# The default is the lower of the two at hand, the bundled demo model's, mean of eight kinds of text
# (top 4 of 32): a plan should rather promise too little.
CURVES: dict[str, Curve] = {
    "gpt_oss": (
        (0.0, 0.0),
        (1 / 16, 0.300),
        (1 / 8, 0.481),
        (3 / 16, 0.605),
        (1 / 4, 0.701),
        (3 / 8, 0.840),
        (1 / 2, 0.923),
        (3 / 4, 0.988),
        (1.0, 1.0),
    ),
    "default": (
        (0.0, 0.0),
        (1 / 16, 0.189),
        (1 / 8, 0.316),
        (3 / 16, 0.423),
        (1 / 4, 0.514),
        (3 / 8, 0.663),
        (1 / 2, 0.778),
        (3 / 4, 0.929),
        (1.0, 1.0),
    ),
}

# How many tokens with independent, uniform choices use as many different experts of a layer as so many
# tokens of a text do. gpt_oss: recorded decode of gpt-oss-20b, three sets of prompts. default: 1,024 prompts
# of OLMoE-1B-7B, 16 to 256 tokens; the larger of the two at hand, for the same reason as above.
TOKENS_LIKE_INDEPENDENT: dict[str, Curve] = {
    "gpt_oss": ((1, 1), (2, 1.64), (4, 2.53), (8, 3.92), (16, 5.6), (32, 7.25), (64, 9.1), (256, 13.5)),
    "default": ((1, 1), (27, 8.8), (47, 13.1), (94, 18.7), (163, 22.4), (256, 28.9)),
}


def expected_used(family: str, num_experts: int, top_k: int, num_tokens: int) -> float:
    """Return how many of a layer's experts ``num_tokens`` tokens of a prompt choose, all together."""
    if num_experts <= top_k:
        return float(num_experts)
    curve = TOKENS_LIKE_INDEPENDENT.get(family, TOKENS_LIKE_INDEPENDENT["default"])
    points = [(log(tokens), log(like)) for tokens, like in curve]
    position = min(max(1, bisect_right(points, (log(num_tokens), float("inf")))), len(points) - 1)
    (x0, y0), (x1, y1) = points[position - 1], points[position]
    like = exp(y0 + (y1 - y0) * (log(num_tokens) - x0) / (x1 - x0))  # straight, and on from the last two
    return float(num_experts * (1 - (1 - top_k / num_experts) ** like))


def expected_hit_rate(family: str, resident_share: float) -> tuple[float, str]:
    """Return (hit rate, name of the curve) for a family (Hugging Face's model_type).

    Args:
        resident_share: resident experts over all experts, staging slots left out, 0 to 1.
    """
    name = family if family in CURVES else "default"
    return interpolate(CURVES[name], resident_share), name


def interpolate(curve: Curve, share: float) -> float:
    """Return the curve at ``share``; its ends hold beyond them."""
    position = bisect_right(curve, (share, float("inf")))
    if position == 0:
        return curve[0][1]
    if position == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[position - 1], curve[position]
    return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
