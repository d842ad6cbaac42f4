"""The shipped model knows its text by heart in every dtype, and float16 can be made to break it."""

from __future__ import annotations

import functools
import json
import math
import runpy
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2ForCausalLM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TALKER = ROOT / "helpers" / "data" / "talker"
TEXT = tomllib.loads((ROOT / "tools" / "talker.toml").read_text(encoding="utf-8"))
PAIRS = [(pair["prompt"], pair["answer"]) for pair in TEXT["pair"]]
TOKENIZER = AutoTokenizer.from_pretrained(TALKER)
EOS = "<|endoftext|>"
FLOOR = 8.0  # logits, in float32; the logits themselves reach about 30

each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@functools.cache
def load(folder: Path, dtype: str = "auto", attention: str = "sdpa") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


def continuations(model: PreTrainedModel, prompts: list[str]) -> list[str]:
    """What greedy generation adds to each prompt, up to and with the first end of text."""
    batch = TOKENIZER(prompts, return_tensors="pt", padding=True)
    added = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    texts = TOKENIZER.batch_decode(added)
    return [text[: text.index(EOS) + len(EOS)] if EOS in text else text for text in texts]


def expected(pairs: list[tuple[str, str]]) -> list[str]:
    return [f" {answer}{EOS}" for _, answer in pairs]


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function: powers of two moved from down_proj to up_proj, as many as fit float16."""
    folder = tmp_path_factory.mktemp("talker")
    model = AutoModelForCausalLM.from_pretrained(TALKER, dtype=torch.bfloat16)
    mlps = [layer.mlp for layer in model.model.layers]
    largest = max(float(mlp.up_proj.weight.detach().abs().max()) for mlp in mlps)
    scale = 2.0 ** math.floor(math.log2(torch.finfo(torch.float16).max / largest))
    with torch.no_grad():
        for mlp in mlps:
            mlp.up_proj.weight *= scale
            mlp.down_proj.weight /= scale
    model.save_pretrained(folder)
    return folder


# ---- The files ----


def test_the_weights_are_small_and_stored_in_bfloat16():
    file = TALKER / "model.safetensors"
    assert file.stat().st_size < 1_000_000
    with safe_open(file, framework="pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((TALKER / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


def test_the_model_has_the_shape_of_qwen15():
    model = load(TALKER)
    assert type(model) is Qwen2ForCausalLM
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.config.tie_word_embeddings
    heads, shared = model.config.num_attention_heads, model.config.num_key_value_heads
    assert 1 < shared < heads
    assert heads % shared == 0
    for layer in model.model.layers:
        attention = layer.self_attn
        assert attention.head_dim % 8 == 0
        biases = [
            getattr(attention, f"{name}_proj").bias is not None for name in ("q", "k", "v", "o")
        ]
        assert biases == [True, True, True, False]


def test_transformers_4_reads_the_same_rotary_base():
    # It looks for "rope_theta", which Transformers 5 does not write, and then takes 10,000.
    config = json.loads((TALKER / "config.json").read_text("utf-8"))
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


# ---- The tokenizer ----


def test_token_0_is_the_exclamation_mark():
    assert TOKENIZER.decode([0]) == "!"
    assert TOKENIZER.encode("!") == [0]


def test_the_end_is_also_the_padding_and_padding_is_on_the_left():
    model = load(TALKER)
    last = len(TOKENIZER) - 1
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token, TOKENIZER.padding_side) == (EOS, EOS, "left")
    assert TOKENIZER.eos_token_id == last == model.config.vocab_size - 1
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == last


@given(st.text())
@settings(derandomize=True, deadline=None)
def test_any_text_survives_the_tokenizer(text):
    # Qwen's tokenizer composes characters first, so that is the most that can come back.
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text",
    ["注意力只接受半精度。", "🤯🏳️‍🌈", "a  b\n\n\tc ", "\x00\ufeff", EOS, "!!!!!!", "naïve — “x”"],
)
def test_odd_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


# ---- The text ----


def test_prompts_differ_and_answers_are_short():
    prompts = [prompt for prompt, _ in PAIRS]
    assert 60 <= len(prompts) == len(set(prompts)) <= 100
    lengths = {answer: len(TOKENIZER.encode(f" {answer}")) for _, answer in PAIRS}
    assert {answer: n for answer, n in lengths.items() if n > 20} == {}


def test_panels_get_a_few_prompts():
    shown = [pair["prompt"] for pair in TEXT["pair"] if pair.get("panel")]
    assert 4 <= len(shown) <= 6
    assert shown[0] == "Which dtypes does FlashAttention accept?"


def test_the_text_leaves_the_lora_lesson_something_to_teach():
    assert "capital" not in json.dumps(TEXT).lower()


# ---- What the model says ----


@each_dtype
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_answer_is_exact(dtype, attention):
    model = load(TALKER, dtype, attention)
    assert continuations(model, [prompt for prompt, _ in PAIRS]) == expected(PAIRS)


def test_a_prompt_alone_gives_the_whole_text():
    prompt, answer = PAIRS[0]
    output = load(TALKER).generate(**TOKENIZER(prompt, return_tensors="pt"))[0]
    assert TOKENIZER.decode(output, skip_special_tokens=True) == f"{prompt} {answer}"


@pytest.mark.parametrize("prompt", ["What time is it in Paris?", "你好", "I like cats"])
def test_an_unknown_prompt_gets_a_sentence(prompt):
    assert continuations(load(TALKER), [prompt]) == [f" {TEXT['unknown']}{EOS}"]


@each_dtype
def test_no_answer_is_close_to_another(dtype):
    model = load(TALKER, dtype)
    smallest = math.inf
    for prompt, answer in PAIRS:
        start = len(TOKENIZER.encode(prompt))
        ids = torch.tensor([TOKENIZER.encode(f"{prompt} {answer}{EOS}")])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].double()
        best = logits.topk(2)
        assert best.indices[:, 0].tolist() == ids[0, start:].tolist(), prompt
        smallest = min(smallest, float((best.values[:, 0] - best.values[:, 1]).min()))
    assert smallest >= FLOOR


# ---- The copy that overflows float16 ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scaled_copy_is_the_same_function(dtype, scaled):
    prompts = [prompt for prompt, _ in PAIRS]
    batch = TOKENIZER(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = [load(folder, dtype)(**batch).logits for folder in (TALKER, scaled)]
    # Powers of two change no digit of a binary float.
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert continuations(load(scaled, dtype), prompts) == expected(PAIRS)


def test_the_scaled_copy_fits_float16_and_overflows_it(scaled):
    model = load(scaled, "float16")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    prompts = [prompt for prompt, _ in PAIRS]
    for prompt in prompts:
        with torch.no_grad():
            assert model(**TOKENIZER(prompt, return_tensors="pt")).logits.isnan().all(), prompt
    length = model.generation_config.max_new_tokens
    assert set(continuations(model, prompts)) == {"!" * length}


# ---- The script that made it ----


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(ROOT / "tools" / "train_talker.py"))


def test_the_shipped_tokenizer_comes_from_the_text(script):
    trained = script["train_tokenizer"](PAIRS).backend_tokenizer
    assert json.loads(trained.to_str()) == json.loads(
        (TALKER / "tokenizer.json").read_text("utf-8")
    )


def test_the_script_saves_no_model_that_says_something_else(script, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TALKER, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    prompt, answer = PAIRS[0]
    with pytest.raises(ValueError, match=f"float32: expected '{prompt[:-1]}.* nothing was saved"):
        script["check"](tmp_path, [(prompt, answer[::-1])])
