"""How results of native ops are compared: to the bit, or with plain PyTorch's own error; shared fixture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_offload import _native, ops


@pytest.fixture
def restore_isa_and_threads() -> Iterator[None]:
    num_threads = ops.num_threads()
    yield
    _native.force_isa("")
    ops.set_num_threads(num_threads)


def assert_same_bits(actual: Tensor, expected: Tensor | np.ndarray) -> None:
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float32
    different = actual.view(torch.int32) != expected.view(torch.int32)
    if different.any():
        first = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} differ, first at {first}: "
            f"{actual[first]!r} != {expected[first]!r}"
        )


def assert_as_accurate_as(actual: Tensor, baseline: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """``actual`` may miss ``exact`` (float64) by ``factor`` times what plain PyTorch (``baseline``) does."""
    allowed = factor * (baseline.double() - exact).abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"max error {error:.3e}, allowed {allowed:.3e}"
