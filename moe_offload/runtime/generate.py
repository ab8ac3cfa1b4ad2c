"""One prompt to one answer: encode, stream, stop, count. Built on transformers' ``generate()``.

``generate()`` is the one call for a path and a prompt. ``run()`` underneath takes a loaded model and
token ids; the command line and the chat use it.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from moe_offload.errors import ConfigError
from moe_offload.runtime.answer_limits import check_limits, room_for_answer
from moe_offload.runtime.answer_parts import ANSWER, COMMENTARY, THINKING, Part, splitter_of
from moe_offload.runtime.generation_result import GenerationResult as GenerationResult
from moe_offload.runtime.generation_result import Sampling as Sampling
from moe_offload.runtime.prompts import encode_chat as encode_chat
from moe_offload.runtime.prompts import encode_prompt as encode_prompt
from moe_offload.runtime.text_stream import TextStream
from moe_offload.runtime.torch_defaults import float32_on_cpu

CONTEXT_IDS = 4  # tokens of the prompt's end that the first new token's text may depend on

OnText = Callable[[str], None]


def generate(
    model: str | Path | Any,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = (),
    system: str | None = None,
    raw: bool = False,
    thinking: bool | None = None,
    stream: bool | OnText = True,
    tokenizer: Any = None,
    **load_options: Any,
) -> GenerationResult:
    """Answer ``prompt`` and print the answer as it comes.

    Args:
        model: a path, or a model from ``from_pretrained`` (then with its ``tokenizer``).
        max_new_tokens: default 256, or what the context has room for.
        stop: texts that end the answer; they are not part of it.
        system: system message for the chat template.
        raw: continue ``prompt`` as it is; otherwise the chat template is applied, where there is one.
        thinking: turns the chat template's switch on or off, where it has one.
        stream: True prints to stdout, False does not, a function is called with each piece of the answer.
        **load_options: ``ram``, ``experts``, ``context`` and the rest of ``from_pretrained``.

    Raises:
        ConfigError, CheckpointError, BudgetError: see ``from_pretrained``; also for an empty prompt
            and one beyond the context.
    """
    sampling = Sampling(temperature, top_p, top_k, seed)
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    check_limits(max_new_tokens, stop)
    on_text = stream if callable(stream) else (_print_piece if stream else _discard)
    path = model if isinstance(model, str | Path) else None
    tokenizer = _tokenizer(model, path, tokenizer, load_options)
    input_ids = encode_prompt(tokenizer, prompt, system=system, raw=raw, thinking=thinking)
    loaded: Any = model if path is None else _load(path, load_options)
    try:
        result = run(
            loaded,
            tokenizer,
            input_ids,
            sampling,
            on_text,
            max_new_tokens=max_new_tokens,
            stop=stop,
            split=not raw,
        )
    finally:
        if path is not None:
            loaded.offload.close()
    if stream is True:
        print(flush=True)
    if result.finish_reason == "interrupted":
        raise KeyboardInterrupt
    return result


def _tokenizer(model: Any, path: str | Path | None, tokenizer: Any, load_options: Mapping[str, Any]) -> Any:
    """Return the tokenizer; what cannot be answered is refused before a model is loaded."""
    if path is not None:
        from moe_offload.storage.tokenizer import load_tokenizer

        return tokenizer or load_tokenizer(path)
    if not hasattr(model, "offload"):
        raise ConfigError(f"a path or a model from from_pretrained is wanted, got {model!r:.80}")
    if load_options:
        raise ConfigError(f"{', '.join(load_options)}: for loading, but the model is loaded already")
    if tokenizer is None:
        raise ConfigError(
            "a loaded model needs its tokenizer: pass tokenizer=moe_offload.load_tokenizer(path)"
        )
    return tokenizer


def _load(path: str | Path, load_options: dict[str, Any]) -> Any:
    from moe_offload.runtime.model import from_pretrained

    return from_pretrained(path, **load_options)


def run(
    model: Any,
    tokenizer: Any,
    input_ids: list[int],
    sampling: Sampling,
    on_text: OnText,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    past_key_values: Any = None,
    on_thinking: OnText | None = None,
    split: bool = True,
) -> GenerationResult:
    """Generate after ``input_ids`` and hand over the text piece by piece.

    Where the model's family marks its thinking, that goes to ``on_thinking`` and not to ``on_text``;
    ``split=False`` takes everything for the answer.

    Ctrl-C ends it with what there is, ``finish_reason="interrupted"``. Tokens that
    ``past_key_values`` holds already are the beginning of ``input_ids`` and are not computed again.

    Raises:
        BudgetError: prompt or new tokens are beyond the context.
    """
    check_limits(max_new_tokens, stop)
    new_tokens = room_for_answer(model.offload, len(input_ids), max_new_tokens)
    config = _generation_config(model, tokenizer, sampling, new_tokens)
    eos_ids = _eos_ids(config)
    splitter = splitter_of(tokenizer, input_ids) if split else None
    stream = TextStream(tokenizer, stop, input_ids[-CONTEXT_IDS:], splitter)
    takers = {ANSWER: on_text, THINKING: on_thinking or _discard, COMMENTARY: on_thinking or _discard}
    watcher = _Watcher(stream, len(input_ids), eos_ids, takers)
    cached_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
    seed = _seed(sampling, config)
    started = time.perf_counter()
    interrupted = _stream_tokens(model, input_ids, config, past_key_values, watcher, seed)
    ended_by_model = watcher.stream.stopped or watcher.token_ids[-1:] in [[eos_id] for eos_id in eos_ids]
    return GenerationResult(
        text=watcher.text(ANSWER),
        thinking=watcher.text(THINKING),
        commentary=watcher.text(COMMENTARY),
        token_ids=watcher.token_ids,
        finish_reason="interrupted" if interrupted else ("stop" if ended_by_model else "length"),
        prompt_tokens=len(input_ids),
        cached_tokens=cached_tokens,
        prefill_s=(watcher.first_token_at or time.perf_counter()) - started,
        decode_s=watcher.last_token_at - watcher.first_token_at,
        seed=seed,
        stats=model.offload.stats().as_dict(),
    )


def _generation_config(model: Any, tokenizer: Any, sampling: Sampling, max_new_tokens: int) -> Any:
    """Return the model's own generation config for one stream, ``sampling`` and the ends of a turn put in."""
    config = copy.deepcopy(model.generation_config)
    sampling.apply(config)
    config.num_beams = config.num_return_sequences = 1  # a stream has one line
    config.max_new_tokens, config.max_length = max_new_tokens, None
    eos_ids = _eos_ids(config)
    if tokenizer.eos_token_id is not None:  # the end of a turn, where the configuration names another end
        eos_ids.add(tokenizer.eos_token_id)
        config.eos_token_id = sorted(eos_ids)
    if config.pad_token_id is None and eos_ids:
        config.pad_token_id = min(eos_ids)
    return config


@float32_on_cpu()
def _stream_tokens(
    model: Any, input_ids: list[int], config: Any, past_key_values: Any, watcher: _Watcher, seed: int | None
) -> bool:
    """Generate into ``watcher``; return whether Ctrl-C ended it. The global random state stays as it was."""
    prompt = torch.tensor([input_ids], dtype=torch.long)
    interrupted = False
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                past_key_values=past_key_values,
                stopping_criteria=StoppingCriteriaList([watcher]),
            )
        except KeyboardInterrupt:
            interrupted = True
    watcher.finish()
    return interrupted


def _seed(sampling: Sampling, config: Any) -> int | None:
    """Return what to seed sampling with; without a choice it is drawn, so torch.manual_seed counts."""
    if not config.do_sample:
        return None
    return sampling.seed if sampling.seed is not None else int(torch.randint(2**63 - 1, ()))


def _eos_ids(config: Any) -> set[int]:
    eos = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


class _Watcher(StoppingCriteria):  # type: ignore[misc]
    """Sees every token as transformers asks whether to stop: streams its text, and says.

    (A transformers streamer would see a token only after that question.)
    """

    def __init__(
        self, stream: TextStream, prompt_tokens: int, eos_ids: set[int], takers: Mapping[str, OnText]
    ) -> None:
        self.stream, self.parts, self.token_ids = stream, list[Part](), list[int]()
        self.first_token_at = self.last_token_at = 0.0
        self._seen, self._eos_ids, self._takers = prompt_tokens, eos_ids, takers

    def text(self, kind: str) -> str:
        """Return all the text of a kind."""
        return "".join(part.text for part in self.parts if part.kind == kind)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new_ids = input_ids[0, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        for token_id in new_ids:
            self.token_ids.append(token_id)
            if token_id not in self._eos_ids:  # printed by some vocabularies, part of none's answer
                self._say(self.stream.push(token_id))
        return torch.full((input_ids.shape[0],), self.stream.stopped, dtype=torch.bool)

    def finish(self) -> None:
        """Hand over what was held back."""
        self._say(self.stream.finish())

    def _say(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self.parts.append(part)
            self._takers[part.kind](part.text)


def _print_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _discard(piece: str) -> None:
    """Take a piece of text and show it to nobody."""
