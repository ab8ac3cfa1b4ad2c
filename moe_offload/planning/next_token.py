"""Is the likeliest next token the one that comes? Whoever reads the logits may sample, or bring a text."""

from __future__ import annotations

EXPECTED_SHARE = 0.8  # of tokens that come as expected, until it is known
SMOOTHING = 0.1
LEAST_SHARE = 0.5  # below, nothing is done for the expected token
ASK_EVERY = 16  # tokens, to see whether that changes


class NextToken:
    """How often the expected token came, and the time until it did.

    Attributes:
        share: of the last tokens, that were the expected ones.
        gap_s: from knowing which to expect to the next token's beginning.
    """

    def __init__(self) -> None:
        self.share, self.gap_s = EXPECTED_SHARE, 0.0
        self._expected: int | None = None
        self._expected_at = 0.0
        self._tokens = 0

    def asks(self) -> bool:
        """Count one more token; whether to find out which to expect after it."""
        self._tokens += 1
        return self.is_trusted or self._tokens % ASK_EVERY == 0

    @property
    def is_trusted(self) -> bool:
        """Whether the expected token comes often enough to act on it."""
        return self.share >= LEAST_SHARE

    def expect(self, token_id: int, now: float) -> None:
        """Note the likeliest token, at a time in seconds."""
        self._expected, self._expected_at = token_id, now

    def came(self, token_id: int | None, now: float) -> None:
        """Note the token that came; None: something else did, which says nothing."""
        if self._expected is None:
            return
        if token_id is not None:
            self.share += SMOOTHING * ((token_id == self._expected) - self.share)
            self.gap_s += SMOOTHING * (now - self._expected_at - self.gap_s)
        self._expected = None
