"""From a prompt or a conversation to token ids: the chat template and its switch for thinking."""

from __future__ import annotations

from typing import Any

from moe_offload.errors import ConfigError

# What chat templates call the switch that turns thinking on and off.
THINKING_SWITCHES = ("enable_thinking", "thinking")


def encode_prompt(
    tokenizer: Any,
    prompt: str,
    *,
    system: str | None = None,
    raw: bool = False,
    thinking: bool | None = None,
) -> list[int]:
    """Return the token ids of a prompt, through the chat template unless ``raw`` or there is none.

    Raises:
        ConfigError: the prompt is empty or no (Unicode) text, or a system message or ``thinking`` has no
            template to go into.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    if not isinstance(prompt, str):
        raise ConfigError(
            f"a prompt is one text, got {type(prompt).__name__}; for a conversation give model.generate() "
            "what tokenizer.apply_chat_template() returns"
        )
    _check_text(prompt)
    if not raw and tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system is not None else []
        return encode_chat(tokenizer, [*messages, {"role": "user", "content": prompt}], thinking=thinking)
    for what, wanted in (("a system message", system), ("a choice about thinking", thinking)):
        if wanted is not None:
            why = "raw was asked for" if raw else "this model has no chat template"
            raise ConfigError(f"{what} goes into the chat template, but {why}; leave out one of the two")
    input_ids: list[int] = tokenizer(prompt)["input_ids"]
    if not input_ids:
        raise ConfigError(f"the tokenizer makes no token of the prompt {prompt[:40]!r}; give another one")
    return input_ids


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], *, thinking: bool | None = None) -> list[int]:
    """Return the token ids of a conversation, up to where the model's answer begins.

    Args:
        thinking: turns the template's switch on or off; None leaves it to the template.

    Raises:
        ConfigError: there is no chat template, it refuses the conversation, or it has no such switch.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError(
            "this model has no chat template, so it was not made for conversations; "
            "use moe-offload generate --raw, which continues a text"
        )
    for message in messages:
        _check_text(message["content"])
    options = {} if thinking is None else {thinking_switch(tokenizer): thinking}
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error
    except Exception as error:  # it is a program that came with the model
        raise ConfigError(
            f"the model's chat template fails with this conversation ({type(error).__name__}: {error}); "
            "generate --raw continues a text without it"
        ) from error
    input_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return input_ids


def _check_text(text: str) -> None:
    """Refuse what stands for bytes that are no text, which tokenizers answer with an error of their own."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20].encode("utf-8", "backslashreplace").decode()
        raise ConfigError(f"the prompt is no UTF-8 text near {around!r}; convert it first") from error


def thinking_switch(tokenizer: Any) -> str:
    """Return the template's own name of its switch.

    Raises:
        ConfigError: it has none.
    """
    variables = _variables(str(tokenizer.chat_template))
    for name in THINKING_SWITCHES:
        if name in variables:
            return name
    other = (
        "it always thinks, at an effort that its template takes as reasoning_effort"
        if "reasoning_effort" in variables
        else "it thinks, or does not, as it was trained"
    )
    raise ConfigError(
        f"this model's chat template has no switch for thinking ({' or '.join(THINKING_SWITCHES)}): {other}; "
        "leave out --think and --no-think (thinking=)"
    )


def _variables(template: str) -> set[str]:
    """Return the names that a template expects from its caller; none where it does not parse."""
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    # transformers' own tag, which jinja2 does not know.
    text = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    try:
        return meta.find_undeclared_variables(environment.parse(text))
    except TemplateError:
        return {name for name in (*THINKING_SWITCHES, "reasoning_effort") if name in template}
