"""Amounts of memory and shares of experts, as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.config import GIB, MIB, RuntimeConfig, parse_bytes, resolve_expert_cap
from moe_offload.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 * GIB),
        ("2 gib", 2 * GIB),
        ("2G", 2 * GIB),
        ("2GB", 2_000_000_000),
        ("512MiB", 512 * MIB),
        ("1.5G", 3 * GIB // 2),
        ("0.1GiB", GIB // 10),
        ("64k", 64 * 1024),
        ("1T", 1 << 40),
        ("123", 123),
        ("123B", 123),
        (123, 123),
    ],
)
def test_an_amount_of_memory_means_what_it_says(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "2XB", "2GiBB", "-1G", "0", "0GiB", "1e9", "nan", "2 2G", "٢G", True, 0, -5, "9" * 40]
)
def test_what_is_no_amount_is_refused_with_the_accepted_forms(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r"is not an amount of memory; accepted are 2GiB or 2G \(binary\)"):
        parse_bytes(text)


@given(st.integers(1, 10**17))
def test_a_number_of_bytes_is_not_rounded(num_bytes: int) -> None:
    assert parse_bytes(num_bytes) == parse_bytes(str(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("experts", "cap"),
    [
        (None, None),
        ("all", 384),
        ("100%", 384),
        ("25%", 96),
        ("33.4%", 128),
        ("0.01%", 1),
        (96, 96),
        ("96", 96),
        (500, 384),
    ],
)
def test_a_share_of_the_experts_is_a_count(experts: str | int | None, cap: int | None) -> None:
    assert resolve_expert_cap(experts, 384) == cap


@pytest.mark.parametrize("experts", [0, "0", "0%", "101%", -1, "-5%", "half", "", "1.5", True, "25 %%"])
def test_nonsense_shares_are_refused(experts: str | int) -> None:
    with pytest.raises(ConfigError, match="is not a share of the model's 384 experts"):
        resolve_expert_cap(experts, 384)


@pytest.mark.parametrize("num_threads", [-1, 0, 1025, 100_000, True, 2.0])
def test_threads_that_no_machine_starts_are_refused(num_threads: int) -> None:
    with pytest.raises(ConfigError, match=f"num_threads must be from 1 to 1024, got {num_threads}"):
        RuntimeConfig(num_threads=num_threads)


@pytest.mark.parametrize("context_tokens", [0, -1, True, 64.0, "64"])
def test_a_context_that_is_no_count_is_refused(context_tokens: object) -> None:
    with pytest.raises(ConfigError, match=f"positive number of tokens, got {context_tokens!r}"):
        RuntimeConfig(context_tokens=context_tokens)  # type: ignore[arg-type]
