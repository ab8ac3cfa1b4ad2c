"""The whole runtime on the CUDA device, over stand-ins for the card: tokens, logits, budgets, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moe_offload
from moe_offload import cuda
from moe_offload.cuda_memory import card_memory
from moe_offload.errors import ConfigError

PROMPT = torch.tensor([[1, 5, 9, 20, 33, 7]])


@pytest.fixture
def stand_in_card(monkeypatch: pytest.MonkeyPatch, stand_in: str) -> Path:
    monkeypatch.setattr(cuda, "LIBRARY", Path(stand_in))
    assert cuda.describe()["on"] and cuda.describe()["devices"][0]["name"] == "stand-in"
    return cuda.LIBRARY


def logits_of(**options: object) -> tuple[list[int], torch.Tensor, dict[str, float]]:
    """Tokens, logits of the last step and statistics of a short greedy run of the demo model."""
    model = moe_offload.from_pretrained(None, context=64, warm_start=False, **options)
    try:
        out = model.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[0].tolist(), out.logits[-1], model.offload.stats().as_dict()
    finally:
        model.offload.close()


@pytest.mark.parametrize(
    "kind", [pytest.param("stand-in", marks=pytest.mark.slow), pytest.param("card", marks=pytest.mark.cuda)]
)
@pytest.mark.parametrize("scheduler", ["hybrid", "on_demand", "static_split"])
def test_a_run_on_the_device_has_the_cpus_bits(
    kind: str, scheduler: str, request: pytest.FixtureRequest
) -> None:
    if kind == "stand-in":
        request.getfixturevalue("stand_in_card")
    elif not cuda.describe()["on"]:
        pytest.skip(f"no card: {cuda.describe()['reason']}")
    tokens, logits, _ = logits_of()
    # Beside the driver's own a part of the experts has room.
    vram = f"{card_memory(0).context_bytes + (18 << 20)}"
    on_card = logits_of(device="cuda", vram=vram, scheduler=scheduler)
    assert on_card[0] == tokens and torch.equal(on_card[1], logits)
    # The hybrid scheduler measures, and the stand-in is slow: it may leave everything to the CPU.
    assert on_card[2]["device_experts"] > 0 or scheduler == "hybrid", "nothing ran there"


def test_more_than_the_card_has_is_refused(stand_in_card: Path) -> None:
    with pytest.raises(ConfigError, match=r"vram=.* is more than cuda has"):
        moe_offload.from_pretrained(None, device="cuda", vram="900GiB")


def test_a_card_that_is_not_there_is_named(stand_in_card: Path) -> None:
    with pytest.raises((ConfigError, moe_offload.errors.DeviceError), match="7"):
        moe_offload.from_pretrained(None, device="cuda:7", vram="530MiB")
