"""Code written for transformers runs unchanged: arguments, pipelines, wrappers, and the end of a model."""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from toy_models import plain_model, save_toy_model
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

import moe_offload
from moe_offload import BudgetError, CheckpointError, ConfigError
from moe_offload.config import DEMO_MODEL, MIB
from moe_offload.residency.memory import process_bytes
from moe_offload.runtime.arguments import _OWN, read_arguments
from moe_offload.runtime.footprint import trim_heap
from moe_offload.runtime.loaded_models import base_bytes, live_handles

GREEDY = {"max_new_tokens": 8, "do_sample": False}
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what now?"}]


@pytest.fixture(scope="module")
def pair(tiny_moe):
    """The plain transformers model, and ours with half of its experts in memory."""
    offloaded = moe_offload.from_pretrained(tiny_moe, experts="50%", ram="8GiB", context=512)
    yield plain_model(tiny_moe), offloaded
    offloaded.offload.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_moe):
    return AutoTokenizer.from_pretrained(tiny_moe)


def load(folder, **options):
    return moe_offload.from_pretrained(folder, **{"ram": "8GiB", "context": 64, **options})


# --- transformers' arguments


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.float16},
        {"torch_dtype": "float16", "dtype": "auto"},
        {"dtype": torch.float16, "torch_dtype": "float16"},
        {"dtype": None, "torch_dtype": "float16"},
    ],
)
def test_both_names_of_dtype_are_known(tiny_moe, options):
    model = load(tiny_moe, **options)
    model.offload.close()
    assert model.dtype == torch.float16


def test_what_scripts_pass_is_accepted(tiny_moe, capsys):
    model, info = load(
        None,
        pretrained_model_name_or_path=str(tiny_moe),
        device_map="auto",
        max_memory={"cpu": "6GiB", 0: "10GiB"},
        ram="auto",
        low_cpu_mem_usage=True,
        offload_folder="elsewhere",
        use_safetensors=True,
        trust_remote_code=False,
        token=None,
        revision="v2",
        attn_implementation="eager",
        generation_config=GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None),
        output_loading_info=True,
        quantization_config=None,
    )
    notes = capsys.readouterr().err
    assert 'device_map="auto": the memory budget places the model' in notes
    assert "max_memory of 0 changes nothing" in notes and "offload_folder" in notes
    assert "revision='v2' changes nothing" in notes
    assert model.offload.plan.ram_bytes == 6 << 30
    assert model.config._attn_implementation == "eager"
    assert model.generate(torch.tensor([[1, 2]])).shape == (1, 5)  # its own generation_config counts
    assert info["missing_keys"] == set() and info["error_msgs"] == []
    model.offload.close()


def test_a_file_of_a_folder_is_named_as_in_transformers(tmp_path):
    (tmp_path / "files" / "q8").mkdir(parents=True)
    shutil.copy(DEMO_MODEL, tmp_path / "files" / "q8" / "demo.gguf")
    model = load(tmp_path, subfolder="files", gguf_file="q8/demo.gguf", experts="25%")
    assert model.config.name_or_path == str(tmp_path / "files" / "q8" / "demo.gguf")
    model.offload.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qant": "q8_0"}, r"does not take 'qant'; did you mean 'quant'\?"),
        ({"use_cache": False}, "does not take 'use_cache'.*on model.config"),
        ({"quantization_config": object()}, 'pass quant="q8_0", "q4_0" or "q4_k"'),
        ({"load_in_4bit": True}, "load_in_4bit=True is not possible"),
        ({"device_map": {"": 0}}, "the memory budget places the model"),
        ({"device_map": "balanced"}, "the memory budget places the model"),
        ({"attn_implementation": "flash_attention_2"}, '"sdpa" and "eager" are'),
        ({"experts_implementation": "grouped_mm"}, "experts are read on demand"),
        ({"use_safetensors": False}, "pickled weights are never read"),
        ({"dtype": "bfloat16", "torch_dtype": torch.float16}, "names of one setting"),
        ({"pretrained_model_name_or_path": "x"}, "two models are named"),
        ({"max_memory": 3}, "max_memory must be a mapping"),
        ({"ram": "4GiB", "max_memory": {"cpu": "1GiB"}}, "names of one setting"),
        ({"prefetch": "no"}, "prefetch must be True or False, got 'no'"),
        ({"warm_start": None}, "warm_start must be True or False, got None"),
        ({"generation_config": {"top_k": 3}}, "must be a GenerationConfig, got dict"),
        ({"config": object()}, "config.json is used"),
        ({"variant": "fp16"}, "folder that holds the files of that variant"),
        ({"trust_remote_code": True}, "never run"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tiny_moe, options, message):
    with pytest.raises(ConfigError, match=message):
        load(tiny_moe, **options)


@pytest.mark.parametrize("path", ["", "a prompt that was given first " * 20])
def test_what_no_file_can_be_called_is_refused(path):
    with pytest.raises(
        ConfigError if not path else CheckpointError, match=r"path is empty|such file|too long"
    ):
        moe_offload.from_pretrained(path)


def test_a_file_without_a_folder_is_refused():
    with pytest.raises(ConfigError, match=r"'x\.gguf' is in which model"):
        moe_offload.from_pretrained(gguf_file="x.gguf")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"token": "secret", "local_files_only": True}, "some-org/a-model"),
        ({"revision": "v2"}, "some-org/a-model@v2"),
        ({"revision": "v2", "gguf_file": "q4/m.gguf"}, "some-org/a-model@v2/q4/m.gguf"),
    ],
)
def test_a_name_on_the_hub_keeps_its_revision_and_file(options, wanted):
    notes = []
    assert read_arguments("some-org/a-model", "auto", "auto", options, notes.append).path == wanted
    assert notes == []


@pytest.mark.parametrize("option", ["subfolder", "cache_dir"])
def test_what_is_not_looked_up_for_a_name_is_refused(option):
    with pytest.raises(ConfigError, match=f"{option}='x' of some-org/a-model, which is no path here"):
        moe_offload.from_pretrained("some-org/a-model", **{option: "x"})


# --- pipelines


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("a string", {}),
        ("a string", {"return_full_text": False, "num_return_sequences": 2, "num_beams": 2}),
        (["one", "and a second, longer one"], {"batch_size": 2}),
        (CHAT, {}),
        ([CHAT, CHAT[1:]], {"return_full_text": False}),
    ],
)
def test_pipelines_answer_as_with_plain_transformers(pair, tokenizer, prompt, options):
    if "batch_size" in options:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
    expected, actual = (
        pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, **GREEDY, **options)
        for model in pair
    )
    assert actual == expected


def test_a_pipeline_feeds_a_streamer_in_a_thread(pair, tokenizer):
    plain, offloaded = pair
    text = pipeline("text-generation", model=plain, tokenizer=tokenizer)("ab", **GREEDY)[0]["generated_text"]
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=60)
    pipe = pipeline("text-generation", model=offloaded, tokenizer=tokenizer)
    thread = threading.Thread(target=pipe, args=("ab",), kwargs={**GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text and len(pieces) > 2


def test_a_pipeline_leaves_the_model_where_it_is(pair, tokenizer):
    _, offloaded = pair
    assert (
        pipeline("text-generation", model=offloaded, tokenizer=tokenizer, device="cpu").device.type == "cpu"
    )
    offloaded.hf_device_map = {"": "cpu"}  # as from_pretrained sets it where there is an accelerator
    pipe = pipeline("text-generation", model=offloaded, tokenizer=tokenizer)
    del offloaded.hf_device_map
    assert pipe.device.type == "cpu"


# --- generate() and what calls it


def test_processors_and_criteria_see_what_plain_transformers_shows(pair):
    def run(model):
        seen = []

        def forbid_the_last(input_ids, scores):
            seen.append(scores.shape)
            return scores.index_fill(1, input_ids[0, -1:], -float("inf"))

        def until_an_even_one(input_ids, scores, **kwargs):
            return torch.tensor([bool(input_ids[0, -1] % 2 == 0 and input_ids.shape[1] > 6)])

        out = model.generate(
            torch.tensor([[10, 11, 12]]),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([forbid_the_last]),
            stopping_criteria=StoppingCriteriaList([until_an_even_one]),
        )
        return out.tolist(), seen

    plain, offloaded = pair
    assert run(offloaded) == run(plain)


class TextModel:
    """The way that chains of other libraries use a model: attributes, encode, generate, decode."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        assert model.can_generate() and not model.config.is_encoder_decoder
        assert Path(model.name_or_path).is_dir()

    def __call__(self, prompts, stop):
        self.tokenizer.pad_token = self.tokenizer.eos_token
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        out = self.model.generate(
            **inputs.to(self.model.device),
            generation_config=GenerationConfig.from_model_config(self.model.config),
            max_new_tokens=12,
            pad_token_id=self.tokenizer.pad_token_id,
            stop_strings=stop,
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert len(out.scores) == out.sequences.shape[1] - inputs["input_ids"].shape[1]
        return self.tokenizer.batch_decode(out.sequences)


def test_a_wrapper_that_only_calls_generate(pair, tokenizer):
    expected, actual = (TextModel(model, tokenizer)(["ab", "longer than that"], ["e"]) for model in pair)
    assert actual == expected


LONG = torch.arange(600).remainder(80)[None] + 3
LONG_CALLS = {
    "a loss": {"labels": LONG},
    "a tuple": {"return_dict": False},
    "a tuple without a cache": {"return_dict": False, "use_cache": False},
    "without the first logits": {"logits_to_keep": -3},
}


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory):
    """As ``pair``, of a model and with a context that take more than one chunk of tokens."""
    folder = save_toy_model("qwen3_moe", tmp_path_factory.mktemp("long"))
    offloaded = load(folder, experts="50%", context=600)
    yield plain_model(folder), offloaded
    offloaded.offload.close()


@pytest.mark.parametrize("name", LONG_CALLS)
def test_a_call_of_more_than_a_chunk_is_answered_as_by_plain_transformers(long_pair, name):
    expected, actual = (model(LONG, **LONG_CALLS[name]) for model in long_pair)
    assert type(actual) is type(expected) and len(actual) == len(expected)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def odd_defaults():
    """What scripts of other models set; native code writes float32 to memory of its own."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def answer_and_logits(tiny_moe):
    return ask(tiny_moe)


def ask(folder):
    prompt = torch.tensor([[5, 6, 7, 8]], device="cpu")
    model = load(folder, experts="50%")
    out = model(prompt)
    last = model(prompt[:, :1], past_key_values=out.past_key_values)
    text = moe_offload.generate(
        model, "ab", tokenizer=moe_offload.load_tokenizer(folder), stream=False, max_new_tokens=6
    ).text
    model.offload.close()
    return text, out.logits, last.logits


def test_the_callers_defaults_of_torch_change_nothing(tiny_moe, answer_and_logits, odd_defaults):
    text, *logits = ask(tiny_moe)
    assert text == answer_and_logits[0]
    assert all(map(torch.equal, logits, answer_and_logits[1:]))


# --- memory, threads and files


def resources():
    """Open files, threads (by id: another test's may end meanwhile) and resident bytes of this process."""
    return len(os.listdir("/proc/self/fd")), set(os.listdir("/proc/self/task")), process_bytes()


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """A model of 98 MiB, 54 of them experts, in float32."""
    return save_toy_model(
        "mixtral",
        tmp_path_factory.mktemp("heavy"),
        vocab_size=22_000,
        hidden_size=256,
        intermediate_size=1024,
    )


def use_every_expert(model):
    ids = torch.arange(3, 91).remainder(80).reshape(1, -1)
    for start in range(0, 88, 8):  # steps of few tokens go through the cache
        model(ids[:, start : start + 8], use_cache=False)


def test_the_footprint_is_what_the_process_grows_by(heavy):
    use_every_expert(warm := load(heavy))  # what libraries take on first use is not the model's
    warm.offload.close()
    gc.collect()
    trim_heap()  # or the model would grow into what others have freed
    before = process_bytes()
    model = load(heavy, experts="all")
    use_every_expert(model)
    grown, footprint = process_bytes() - before, model.get_memory_footprint()
    dense_bytes = 4 * 2 * 22_000 * 256
    assert footprint > dense_bytes + 54 * MIB
    assert abs(grown - footprint) < 16 * MIB, f"{grown} {footprint}"
    cache = model(torch.tensor([[3, 4]])).past_key_values
    assert model.get_memory_footprint() > footprint
    del cache
    gc.collect()
    assert model.get_memory_footprint() == footprint
    assert model.get_memory_footprint(return_buffers=False) < footprint
    model.offload.close()
    assert model.get_memory_footprint() == 0


def test_fewer_experts_in_memory_are_a_smaller_footprint(heavy):
    whole, third = load(heavy, experts="all"), load(heavy, experts=6)
    saved = whole.get_memory_footprint() - third.get_memory_footprint()
    whole.offload.close(), third.offload.close()
    assert saved >= 12 * 3 * MIB


def test_a_closed_model_gives_everything_back(heavy):
    use_every_expert(warm := load(heavy))
    warm.offload.close()
    gc.collect()
    trim_heap()
    files, threads, resident = resources()
    model = load(heavy, experts="all")
    use_every_expert(model)
    held = resources()
    assert held[0] > files and held[1] - threads and held[2] > resident + 80 * MIB
    model.offload.close()
    after = resources()  # the object is still alive, and of no more use
    assert after[0] == files and after[1] <= threads
    assert after[2] < resident + 16 * MIB


def test_a_dropped_model_is_closed_by_itself(heavy):
    gc.collect()
    files, threads, _ = resources()
    model = load(heavy)
    reference = weakref.ref(model)
    del model
    gc.collect()
    after = resources()
    assert reference() is None and after[0] == files and after[1] <= threads


def test_two_models_share_one_budget(heavy, tiny_moe):
    first = load(heavy, ram="8GiB", experts=6)
    alone = first.offload.plan
    second = load(tiny_moe, ram="8GiB")
    assert second.offload.plan.base_bytes >= first.offload.planned_bytes + alone.base_bytes - 16 * MIB
    with pytest.raises(BudgetError):  # room for one, not for a second beside it
        load(heavy, ram=alone.total_bytes + 20 * MIB)
    prompt = torch.tensor([[5, 6, 7, 8]])
    both = [model.generate(prompt, **GREEDY).tolist() for model in (first, second, first, second)]
    assert both[:2] == both[2:]
    first.offload.close()
    assert second.generate(prompt, **GREEDY).tolist() == both[1]
    again = load(heavy, ram=alone.total_bytes + 40 * MIB + second.offload.planned_bytes, experts=6)
    assert again.generate(prompt, **GREEDY).tolist() == both[0]
    again.offload.close(), second.offload.close()
    assert not {again.offload, second.offload, first.offload} & set(live_handles)


def test_what_the_caller_holds_besides_counts_beside_a_model(heavy):
    """Loaded between two models, it was taken for a part of what the first had still to fill."""
    first = load(heavy, experts="all")
    ballast = bytearray(160 * MIB)
    ballast[::4096] = bytes(b"x" * len(range(0, len(ballast), 4096)))
    offload, planned = first.offload, base_bytes()
    others = process_bytes() - offload.touched_bytes() - offload.plan.workspace_bytes
    untouched = offload.planned_bytes - offload.touched_bytes()
    first.offload.close()
    assert untouched > 50 * MIB
    assert planned >= others + offload.planned_bytes - 4 * MIB


def test_two_models_generate_at_the_same_time(tiny_moe, heavy):
    models = [load(tiny_moe, experts="50%"), load(heavy, experts=6)]
    prompt = torch.tensor([[5, 6, 7, 8]])
    wanted = [model.generate(prompt, **GREEDY) for model in models]
    results = [None, None]

    def run(index):
        for _ in range(4):
            results[index] = models[index].generate(prompt, **GREEDY)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        model.offload.close()
    assert all(map(torch.equal, results, wanted))


def test_closing_ends_a_generation_in_another_thread(tiny_moe):
    model = load(tiny_moe, context=2048)
    begun, errors = threading.Event(), []

    def announce(input_ids, scores, **kwargs):
        begun.set()
        return torch.tensor([False])

    def run():
        try:
            model.generate(
                torch.tensor([[5]]), max_new_tokens=2000, eos_token_id=None, stopping_criteria=[announce]
            )
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)
    model.offload.close()
    thread.join(60)
    assert errors and "was closed by offload.close()" in errors[0]


def test_closing_from_inside_a_forward_is_refused(tiny_moe):
    model = load(tiny_moe)
    model.offload.on_prefill = lambda done, total: model.offload.close()
    with pytest.raises(ConfigError, match="inside a forward of the model"):
        model(torch.arange(20).reshape(1, -1))
    model.offload.on_prefill = None
    assert model(torch.arange(20).reshape(1, -1)).logits.shape[1] == 20
    model.offload.close()


def test_a_misspelt_argument_is_answered_with_any_of_our_own_names() -> None:
    """So that a new argument of from_pretrained is not forgotten in the list of suggestions."""
    parameters = inspect.signature(moe_offload.from_pretrained).parameters.values()
    ours = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert ours == set(_OWN)
