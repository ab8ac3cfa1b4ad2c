"""Try every transformers family that routes through its experts interface; write docs/FAMILIES.md.

    python tests/walk_families.py            # a minute or two; rewrites the table

A family passes when a tiny random model of it, saved as transformers saves it, gives plain
transformers' logits, the logits of a prompt in chunks, and its greedy tokens in a left-padded batch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from toy_models import COMMON, TOY_CONFIGS, plain_model, save_model
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache
from transformers.utils import logging as transformers_logging

import moe_offload
from moe_offload.storage.families import ANY_NAMES, MOE_FAMILIES, MOE_FAMILIES_BY_TRIAL

DOCUMENT = Path(__file__).parents[1] / "docs" / "FAMILIES.md"
BEGIN, END = "<!-- walk: begin -->\n", "<!-- walk: end -->\n"
PROMPTS = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
LONG_TOKENS = 600

# Sizes by the names that configurations use; a name that a family does not have is left out.
SIZES: dict[str, Any] = {
    **COMMON, "num_hidden_layers": 4, "head_dim": 16, "swa_head_dim": 16, "global_head_dim": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "moe_k": 2,
    "moe_topk": 2, "top_k_experts": 2, "num_experts_per_token": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "intermediate_size": 40, "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24, "dense_intermediate_size": 40, "moe_shared_expert_intermediate_size": 24,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_dt_rank": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "sliding_window": 8,
    "vocab_size_per_layer_input": 97,
    "num_nextn_predict_layers": 0, "linear_head_dim": 16, "linear_num_heads": 4,
}  # fmt: skip
# What a family's own checks ask for.
SPECIAL: dict[str, dict[str, Any]] = {
    **{  # a latent is expanded to every head
        name: {"num_key_value_heads": 4}
        for name in ["axk2", "bailing_hybrid", "deepseek_v32", "glm_moe_dsa", "glm5_next_text", "kimi_linear"]
    },
    "axk1": {"num_key_value_heads": 4, "head_dim": 8},
    "dots3_note_text": {
        "num_key_value_heads": 4, "head_dim": 20, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16, "swa_head_dim": 20, "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 12,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 256,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 97, "hc_lowrank": 16,
        "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What became of one family."""

    model_type: str
    experts: str  # name of the experts class
    passed: bool
    reason: str = ""


def discover() -> Iterator[tuple[Any, str]]:
    """Yield (module, experts class name) of every modeling file whose experts use the interface."""
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        if "use_experts_implementation" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name, item in inspect.getmembers(module, inspect.isclass):
            if item.__module__ == module.__name__ and hasattr(item, "_apply_gate"):
                yield module, name


def text_configs(module: Any) -> list[Any]:
    """Configuration classes of the module's causal language models."""
    found = []
    for config_class in CONFIG_MAPPING.values():
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
        classes = model_class if isinstance(model_class, tuple) else (model_class,)
        if any(getattr(item, "__module__", None) == module.__name__ for item in classes):
            found.append(config_class)
    return [item for item in found if "text_config" not in item.sub_configs] or found


def tiny_config(config_class: Any) -> Any:
    """A configuration of the family with every size small, or the one that test_families.py uses."""
    model_type = config_class.model_type
    for toy_type, values in TOY_CONFIGS.values():
        if toy_type == model_type:
            return config_class(**{**COMMON, **values})
    default = config_class()
    default.allow_global_per_layer_attribute_access = True
    values = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    num_layers = default.num_hidden_layers
    for name, value in default.to_dict().items():
        if isinstance(value, list) and len(value) == num_layers and name not in values:
            kinds = list(dict.fromkeys(map(str, value)))
            by_text = {str(item): item for item in value}
            values[name] = [by_text[kinds[i % len(kinds)]] for i in range(4)]
    if "layer_types" in values and default.to_dict().get("per_layer_config"):
        values["per_layer_config"] = None
    return config_class(**{**values, **SPECIAL.get(model_type, {})})


def compare(plain: Any, folder: Path) -> None:
    """Raise AssertionError where the offloaded model differs from plain transformers."""
    offloaded = moe_offload.from_pretrained(folder, experts="50%", ram="16GiB", context=1024)
    try:
        with torch.no_grad():
            expected = plain(PROMPTS, attention_mask=MASK).logits[MASK.bool()]
            actual = offloaded(PROMPTS, attention_mask=MASK).logits[MASK.bool()]
            _near(actual, expected, "logits", 1e-5)
            generator = torch.Generator().manual_seed(3)
            prompt = torch.randint(3, 97, (1, LONG_TOKENS), generator=generator)
            _check_chunks(plain, prompt)
            expected = plain(prompt).logits
            _near(offloaded(prompt, use_cache=False).logits, expected, "logits of a long prompt", 3e-5)
        kwargs = {"attention_mask": MASK, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
        same = torch.equal(offloaded.generate(PROMPTS, **kwargs), plain.generate(PROMPTS, **kwargs))
        assert same, "greedy tokens of a left-padded batch differ"
    finally:
        offloaded.offload.close()


def _check_chunks(plain: Any, prompt: torch.Tensor) -> None:
    """Refuse a family that plain transformers itself cannot run in chunks: there is nothing to equal."""
    whole, cache = plain(prompt).logits, DynamicCache(config=plain.config)
    halves = prompt.chunk(2, dim=1)
    parts = [plain(part, past_key_values=cache, use_cache=True).logits for part in halves]
    what = "plain transformers disagrees with itself: its logits of a prompt in one piece and in two"
    _near(torch.cat(parts, dim=1), whole, what, 3e-5)


def _near(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float) -> None:
    scale = max(1.0, float(expected.abs().max()))
    difference = float((actual - expected).abs().max())
    assert torch.isfinite(expected).all(), f"plain transformers gives no finite {what}"
    assert difference <= tolerance * scale, f"{what} differ by {difference / scale:.0e} of the largest"


@contextlib.contextmanager
def described(model_type: str) -> Iterator[None]:
    """Let a family without a row be tried by the usual names."""
    unknown = model_type not in {**MOE_FAMILIES, **MOE_FAMILIES_BY_TRIAL}
    if unknown:
        MOE_FAMILIES_BY_TRIAL[model_type] = replace(ANY_NAMES, transposed=model_type == "aria_text")
    try:
        yield
    finally:
        if unknown:
            del MOE_FAMILIES_BY_TRIAL[model_type]


def run_trial(config_class: Any, experts: str) -> Trial:
    model_type, step = config_class.model_type, "a tiny configuration"
    folder = Path(tempfile.mkdtemp())
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            config = tiny_config(config_class)
            step = "plain transformers"
            save_model(config, folder)
            plain = plain_model(folder)
            step = ""
            with described(model_type):
                compare(plain, folder)
    except Exception as error:  # whatever transformers raises is the family's reason
        text = re.sub(re.escape(str(folder)) + r"[^:]*: ", "", str(error))
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2])[:220].replace("|", "/")
        return Trial(model_type, experts, False, f"{step}: {reason}" if step else reason)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Trial(model_type, experts, True)


def walk(only: list[str] | None = None) -> list[Trial]:
    """Try every family, or those named."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    trials: dict[str, Trial] = {}
    for module, experts in discover():
        configs = text_configs(module)
        if not configs:
            name = module.__name__.split(".")[-2]
            trials[name] = Trial(name, experts, False, "transformers has no causal language model of it")
        for config_class in configs:
            if only is None or config_class.model_type in only:
                trials[config_class.model_type] = run_trial(config_class, experts)
    return sorted(trials.values(), key=lambda trial: (not trial.passed, trial.model_type))


def table(trials: list[Trial]) -> str:
    """Return the Markdown between the marks of docs/FAMILIES.md."""
    passed = [trial for trial in trials if trial.passed]
    lines = [
        f"transformers {transformers.__version__}: {len(passed)} of {len(trials)} families pass.",
        "",
        "| model_type | |",
        "|---|---|",
        *(f"| {trial.model_type} | {'passes' if trial.passed else trial.reason} |" for trial in trials),
        "",
    ]
    return "\n".join(lines)


def document_with(trials: list[Trial]) -> str:
    """Return docs/FAMILIES.md with its table made new."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(trials)}\n{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="model types to try; prints, writes nothing")
    arguments = parser.parse_args()
    trials = walk(arguments.only)
    if arguments.only:
        print(table(trials))
    else:
        DOCUMENT.write_text(document_with(trials), encoding="utf-8")
        print(table(trials))
