"""LoRA adapters: against what peft saves, attaches and merges, and what Transformers loads."""

import contextlib
import csv
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers import backend, checkpoints, state
from helpers.adapter import attach, base_of, read, refuse_merge
from helpers.checklist import Checklist, Line
from helpers.checklist import same_dtype as checklist
from helpers.errors import PlanError
from helpers.files import Tensor
from helpers.plan import DTYPES as LOADS

ROOT = Path(__file__).resolve().parent.parent
FIVE = Version(transformers.__version__).major >= 5
NAMES = checkpoints.available()
HALF = ("bfloat16", "float16")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
CODES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

pytestmark = pytest.mark.usefixtures("one_thread")


# Adapters that peft has made and saved.


def load(base="bf16", dtype="auto", attention="sdpa"):
    folder = checkpoints.get(base) if base in NAMES else base
    argument = {} if dtype == "omitted" else {"dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **argument)


def adapted(model, autocast_adapter_dtype=True, **changes):
    """With a trained adapter: a new one computes nothing, because its lora_B is zero."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(**settings), autocast_adapter_dtype=autocast_adapter_dtype
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
)
GPT2 = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)


def shallow(layers=2):
    """The bf16 checkpoint's shape with another number of layers."""
    config = load().config
    config.num_hidden_layers = layers
    config.layer_types = ["full_attention"] * layers
    return type(load())(config)


MADE = {
    "bf16": lambda: adapted(load("bf16")),
    "fp16": lambda: adapted(load("fp16")),
    "dora": lambda: adapted(load("bf16"), use_dora=True, target_modules=["q_proj", "v_proj"]),
    "16 bit": lambda: adapted(load("bf16"), autocast_adapter_dtype=False),
    "llama": lambda: adapted(LlamaForCausalLM(LLAMA)),
    "gpt2": lambda: adapted(GPT2LMHeadModel(GPT2), target_modules=["c_attn"], fan_in_fan_out=True),
    "shallow": lambda: adapted(shallow(), target_modules=["q_proj", "k_proj"]),
    "deep": lambda: adapted(shallow(4), target_modules=["q_proj", "k_proj"]),
    "embedding": lambda: adapted(LlamaForCausalLM(LLAMA), target_modules=["embed_tokens"]),
    "ia3": lambda: get_peft_model(load("bf16"), IA3Config(task_type="CAUSAL_LM")),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory, own_cache):
    """The folder of an adapter by its name in MADE."""
    root = tmp_path_factory.mktemp("adapters")

    def folder(name):
        if not (root / name).is_dir():
            with warnings.catch_warnings():  # peft cannot ask the hub about a changed embedding
                warnings.simplefilter("ignore")
                MADE[name]().save_pretrained(root / name, save_embedding_layers=False)
        return root / name

    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A folder to spoil."""
    return lambda name="bf16": shutil.copytree(saved(name), tmp_path / "copy")


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def assert_sentence(error, *parts):
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert ". " not in sentence
    assert ": " in sentence
    for part in parts:
        assert str(part) in sentence


# What a folder says.


@pytest.mark.parametrize("name", ["bf16", "fp16", "dora", "16 bit", "gpt2"])
def test_read_says_what_peft_and_safetensors_read(saved, name):
    found = read(saved(name))
    config = LoraConfig.from_pretrained(saved(name))
    tensors = load_file(saved(name) / "adapter_model.safetensors")
    assert found.base == (config.base_model_name_or_path or None)
    assert (found.peft_type, found.r, found.use_dora) == ("LORA", config.r, config.use_dora)
    assert set(found.target_modules) == set(config.target_modules)
    assert found.tensors == {
        name: Tensor(CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert found.folder == saved(name)
    assert read(str(saved(name))) == found


def test_target_modules_may_be_one_regular_expression(copy):
    folder = copy()
    edit(folder, target_modules=r".*\.(q|v)_proj")
    assert read(folder).target_modules == r".*\.(q|v)_proj"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 941184\n"


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def overwrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def settings(**changes):
    return lambda folder: edit(folder, **changes)


SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, ["There is no folder"]),
        (remove(SETTINGS), ["has no adapter_config.json"]),
        (overwrite(SETTINGS, b"{"), ["is not a JSON object", "adapter_config.json"]),
        (overwrite(SETTINGS, b""), ["is not a JSON object"]),
        (overwrite(SETTINGS, b"[]"), ["is not a JSON object", "it holds []"]),
        (overwrite(SETTINGS, b"\xff\xfe"), ["is not a JSON object"]),
        (overwrite(SETTINGS, b"[" * 200_000), ["is not a JSON object"]),
        (settings(peft_type="IA3"), ["'IA3'", "'LORA'"]),
        (settings(peft_type=None), ["None", "'LORA'"]),
        (settings(r="8"), ["'8' for 'r'", "whole number"]),
        (settings(r=0), ["0 for 'r'"]),
        (settings(r=True), ["True for 'r'"]),
        (settings(target_modules=[1]), ["[1] for 'target_modules'"]),
        (settings(base_model_name_or_path=3), ["3 for 'base_model_name_or_path'"]),
        (settings(use_dora="no"), ["'no' for 'use_dora'", "true or false"]),
        (remove(WEIGHTS), ["no weights", "put adapter_model.safetensors"]),
        (truncate, ["not a complete safetensors file"]),
        (overwrite(WEIGHTS, POINTER), ["not a complete safetensors file", "git lfs pull"]),
        (overwrite(WEIGHTS, b""), ["not a complete safetensors file"]),
        (overwrite(WEIGHTS, b"\2" + bytes(7) + b"{}"), ["holds no tensor of a LoRA"]),
    ],
)
def test_folder_that_is_no_adapter_is_one_sentence(copy, spoil, parts):
    folder = copy()
    spoil(folder)
    with pytest.raises(PlanError) as caught:
        read(folder)
    assert_sentence(caught, folder.name, *parts)


def test_whole_model_is_no_adapter():
    with pytest.raises(PlanError) as caught:
        read(checkpoints.get("bf16"))
    assert_sentence(caught, "holds a whole model and no adapter", "from_pretrained")


def test_adapter_of_another_kind_is_named(saved):
    with pytest.raises(PlanError) as caught:
        read(saved("ia3"))
    assert_sentence(caught, "'IA3'")


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_pickle_is_not_opened(copy, tmp_path):
    folder, sprung = copy(), tmp_path / "sprung"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(str(sprung))))
    with pytest.raises(PlanError) as caught:
        read(folder)
    assert_sentence(caught, "adapter_model.bin", "a pickle", "save it again")
    assert not sprung.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert sprung.exists()  # so it would have been seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
GOOD = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
BAD_SETTINGS = (
    st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(sorted(vars(LoraConfig()))), JSON, max_size=3).map(
        lambda changes: json.dumps(GOOD | changes).encode()
    )
)


def header(value):
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


SHAPE = st.lists(st.integers(-1, 9) | st.just(2**63), max_size=3)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "?"]),
        "shape": SHAPE,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2),
    }
)
BAD_WEIGHTS = (
    st.binary()
    | JSON.map(header)
    | st.builds(
        lambda entries, data: header(entries) + data,
        st.dictionaries(st.text() | st.just("a.lora_A.weight"), ENTRY | JSON, max_size=3),
        st.binary(max_size=64),
    )
)


@pytest.fixture(scope="module")
def spoilt(saved, tmp_path_factory):
    return shutil.copytree(saved("bf16"), tmp_path_factory.mktemp("spoilt") / "adapter")


def assert_sentence_or_nothing(function, folder):
    message = "."
    try:
        function(folder)
    except PlanError as error:
        message = str(error)
    assert "\n" not in message
    assert message.endswith(".")


@given(content=BAD_SETTINGS)
@example(content=json.dumps({**GOOD, "base_model_name_or_path": "a\0b"}).encode())
@example(content=json.dumps({**GOOD, "base_model_name_or_path": "\ud800\n"}).encode())
@example(content=json.dumps({**GOOD, "base_model_name_or_path": "x" * 9999}).encode())
@example(content=json.dumps({**GOOD, "base_model_name_or_path": "a/b\n"}).encode())
@example(content=json.dumps({**GOOD, "peft_type": "LORA\n" * 99}).encode())
@example(content=json.dumps({**GOOD, "target_modules": None}).encode())
@example(content=json.dumps({**GOOD, "target_modules": "("}).encode())
def test_arbitrary_settings_raise_one_sentence_or_nothing(spoilt, saved, content):
    shutil.copyfile(saved("bf16") / WEIGHTS, spoilt / WEIGHTS)
    (spoilt / SETTINGS).write_bytes(content)
    for function in (read, base_of, lambda folder: checklist(folder, "bf16")):
        assert_sentence_or_nothing(function, spoilt)


@given(content=BAD_WEIGHTS)
@example(content=header({"a.lora_A.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}))
def test_arbitrary_weights_raise_one_sentence_or_nothing(spoilt, saved, content):
    shutil.copyfile(saved("bf16") / SETTINGS, spoilt / SETTINGS)
    (spoilt / WEIGHTS).write_bytes(content)
    for function in (read, lambda folder: checklist(folder, "bf16")):
        assert_sentence_or_nothing(function, spoilt)


# Where the base is.


def test_base_is_the_folder_that_the_adapter_names(saved):
    assert Path(base_of(saved("bf16"))) == checkpoints.get("bf16")
    assert Path(base_of(saved("fp16"))) == checkpoints.get("fp16")


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        ("no/such-model", ["The base 'no/such-model' of the adapter", "is not here"]),
        ("/no/such/folder", ["The base '/no/such/folder' of the adapter", "is not here"]),
        ("..", ["is not here"]),
        ("", ["names no base"]),
        (None, ["names no base"]),
    ],
)
def test_base_that_is_not_here_is_one_sentence(copy, base, parts):
    folder = copy()
    edit(folder, base_model_name_or_path=base)
    with pytest.raises(PlanError) as caught:
        base_of(folder)
    assert_sentence(caught, folder.name, *parts)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_a_base_is_not_here(copy, tmp_path, missing):
    folder, base = copy(), shutil.copytree(checkpoints.get("bf16"), tmp_path / "base")
    edit(folder, base_model_name_or_path=str(base))
    assert base_of(folder) == str(base)
    (base / missing).unlink()
    with pytest.raises(PlanError) as caught:
        base_of(folder)
    assert_sentence(caught, "is not here")


HUB = """
import json, sys
from helpers import adapter, errors
try:
    print(json.dumps(adapter.base_of(sys.argv[1])))
except errors.PlanError as error:
    print(json.dumps([str(error)]))
"""


def test_base_may_be_a_hub_id_in_the_cache(copy, tmp_path, fresh_python):
    folder, cache = copy(), tmp_path / "hub"
    edit(folder, base_model_name_or_path="some/model")
    snapshot = cache / "models--some--model" / "snapshots" / ("a" * 40)
    shutil.copytree(checkpoints.get("bf16"), snapshot)
    refs = cache / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    environment = {"HF_HUB_CACHE": str(cache)}
    assert Path(fresh_python(HUB, folder, env=environment)) == snapshot
    (snapshot / "model.safetensors").unlink()
    (sentence,) = fresh_python(HUB, folder, env=environment)
    assert "The base 'some/model' of the adapter" in sentence


# Putting it on a model.


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["bf16", "dora", "16 bit"])
def test_attach_is_what_peft_does(saved, name):
    ours, theirs = attach(load(), saved(name)), PeftModel.from_pretrained(load(), saved(name))
    assert type(ours) is type(theirs)
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(load()))
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_attach_knows_grouped_query_attention_and_transposed_weights(saved):
    assert isinstance(attach(load("fp16"), saved("fp16")), PeftModel)
    assert isinstance(attach(GPT2LMHeadModel(GPT2), saved("gpt2")), PeftModel)


def test_attach_reads_no_random_numbers(saved):
    model, before = load(), torch.get_rng_state()
    attach(model, saved("bf16"))
    assert torch.equal(torch.get_rng_state(), before)


def peft_does(model, folder):
    """What peft raises and what it warns of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(model, folder)
        except Exception as error:
            return error, warned
    return None, warned


K, Q2 = "'model.layers.0.self_attn.k_proj'", "'model.layers.2.self_attn.q_proj'"
C = "'transformer.h.0.attn.c_attn'"
FITS_NOT = [
    ("fp16", load, ["(128, 128) in the model and (64, 128) in the adapter", K, "fp16", "bf16"]),
    ("bf16", lambda: load("fp16"), ["(64, 128) in the model and (128, 128) in the adapter", K]),
    ("llama", load, ["in the model and (64, 96) in the adapter", "layers.0.mlp.down_proj"]),
    ("bf16", lambda: LlamaForCausalLM(LLAMA), ["(64, 96) in the model", "LlamaForCausalLM"]),
    ("gpt2", load, [f"the model has no module {C}"]),
    ("gpt2", lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4)), ["(384, 128)", "(192, 64)"]),
    ("shallow", load, ["no tensors for the module", "'model.layers.2."]),
    ("deep", load, ["the model has no module 'model.layers.3."]),
]


@pytest.mark.parametrize(("name", "make", "parts"), FITS_NOT)
def test_adapter_that_does_not_fit_is_one_sentence_and_changes_nothing(saved, name, make, parts):
    model, folder = make(), saved(name)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad = False
    model.train()
    before = snapshot(model)
    with pytest.raises(PlanError) as caught:
        attach(model, folder)
    assert_sentence(caught, f"{name}'", "does not fit", *parts)
    assert_same(model, before)


def snapshot(model):
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, p.clone(), p.requires_grad) for name, p in model.named_parameters()],
        sorted(vars(model)),
        torch.get_rng_state(),
    )


def assert_same(model, before):
    modules, parameters, attributes, random = snapshot(model)
    assert modules == before[0]
    for (name, p, grad), (old_name, old, old_grad) in zip(parameters, before[1], strict=True):
        assert (name, grad) == (old_name, old_grad)
        assert torch.equal(p, old)
    assert attributes == before[2]
    assert torch.equal(random, before[3])


def test_what_peft_does_where_the_two_do_not_fit(saved):
    error, _ = peft_does(load(), saved("fp16"))
    assert isinstance(error, RuntimeError)
    assert str(error).count("\n\tsize mismatch") == 6  # k and v of three layers
    error, _ = peft_does(load(), saved("gpt2"))
    assert "not found in the base model" in str(error)
    error, (warned, *_) = peft_does(load(), saved("shallow"))
    assert error is None
    assert "Found missing adapter keys" in str(warned.message)
    assert peft_does(load(), saved("deep")) == (None, [])  # not a word


def test_message_calls_the_model_as_the_caller_does(saved):
    with pytest.raises(PlanError) as caught:
        attach(load(), saved("fp16"), base="bf16")
    assert_sentence(caught, f"of the base {str(checkpoints.get('fp16'))!r}", "the model 'bf16'")


def test_rank_that_config_and_tensors_do_not_share(copy):
    folder = copy()
    edit(folder, r=8)
    with pytest.raises(PlanError) as caught:
        attach(load(), folder)
    assert_sentence(caught, "rank 4 in adapter_model.safetensors and 8 in adapter_config.json")


def test_ranks_may_differ_by_module(tmp_path):
    adapted(load(), rank_pattern={"q_proj": 2}).save_pretrained(tmp_path / "ranks")
    assert isinstance(attach(load(), tmp_path / "ranks"), PeftModel)


def test_matrix_without_its_other_half(copy):
    folder = copy()
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "layers.1.self_attn.o_proj.lora_B" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / WEIGHTS)
    with pytest.raises(PlanError) as caught:
        attach(load(), folder)
    assert_sentence(caught, "no matrices lora_A and lora_B for 'model.layers.1.self_attn.o_proj'")


def test_model_that_has_an_adapter_already(saved):
    once = attach(load(), saved("bf16"))
    before = logits(once)
    for model in (once, once.get_base_model()):
        with pytest.raises(PlanError) as caught:
            attach(model, saved("bf16"))
        assert_sentence(caught, "has an adapter already")
    assert torch.equal(logits(once), before)
    assert isinstance(attach(once.merge_and_unload(), saved("bf16")), PeftModel)


def test_what_only_peft_finds_is_one_sentence_and_changes_nothing(saved):
    config = LlamaConfig.from_dict(LLAMA.to_dict() | {"vocab_size": 96})
    model, folder = LlamaForCausalLM(config), saved("embedding")
    before, expected = snapshot(model), logits(model)
    with pytest.raises(PlanError) as caught:
        attach(model, folder)
    assert_sentence(caught, "peft cannot attach", "embed_tokens", "embedding'")
    assert_same(model, before)
    assert torch.equal(logits(model), expected)
    assert isinstance(peft_does(model, folder)[0], RuntimeError)


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_alpha": {}},
        {"rank_pattern": 3},
        {"lora_dropout": 7},
        {"modules_to_save": "lm_head"},  # read as seven names; peft wraps modules in wrapped ones
    ],
    ids=str,
)
def test_settings_that_peft_does_not_take(copy, setting):
    folder = copy()
    edit(folder, **setting)
    assert not isinstance(peft_does(load(), folder)[0], PlanError | None)
    model = load()
    before = snapshot(model)
    with pytest.raises(PlanError) as caught:
        attach(model, folder)
    assert_sentence(caught, "peft cannot", folder.name)
    assert_same(model, before)


# Merging.


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory):
    """A checkpoint that Transformers' own quantiser takes on a CPU without further packages; the
    usual one, bitsandbytes, is not installed here."""
    folder = shutil.copytree(checkpoints.get("bf16"), tmp_path_factory.mktemp("q") / "bitnet")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_merge_into_a_quantised_base_is_refused(bitnet, saved):
    model = load(bitnet)
    assert type(model.hf_quantizer).__name__ == "BitNetHfQuantizer"
    peft_model = attach(model, saved("bf16"))
    for quantised in (model, peft_model):
        with pytest.raises(PlanError) as caught:
            refuse_merge(quantised)
        assert_sentence(caught, "quantised (bitnet)", "load the base in bfloat16")
    merged = peft_model.merge_and_unload()  # peft says nothing
    assert merged.is_quantized


def quantise_by_hand(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.to(torch.float8_e4m3fn), False)


def set_flag(model):
    model.is_quantized = True


def set_config(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("quantise", "how"),
    [
        (quantise_by_hand, "weights in float8_e4m3fn"),
        (set_flag, "by an unnamed method"),
        (set_config, "bitsandbytes"),
    ],
)
def test_each_sign_of_quantisation_is_enough(saved, quantise, how):
    model = load()
    peft_model = attach(model, saved("bf16"))
    refuse_merge(peft_model)
    quantise(model)
    with pytest.raises(PlanError) as caught:
        refuse_merge(peft_model)
    assert_sentence(caught, f"quantised ({how})")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merge_of_a_usual_base_is_not_refused(saved, dtype):
    model = attach(load(dtype=dtype), saved("bf16"))
    assert refuse_merge(model) is None
    assert refuse_merge(model.merge_and_unload()) is None


@pytest.mark.skipif(not FIVE, reason="Transformers 4 does not dequantise fp8 on a CPU")
def test_merge_of_a_dequantised_base_is_not_refused(saved, tmp_path):
    folder = shutil.copytree(checkpoints.get("bf16"), tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    model = load(folder)
    assert model.is_quantized is False
    assert refuse_merge(attach(model, saved("bf16"))) is None


# The checklist: what loads.


def dtypes_of(model):
    return {CODES[parameter.dtype] for parameter in model.parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_predicted_dtype_is_the_one_that_transformers_loads(saved, name):
    folder = saved("fp16" if name == "fp16" else "bf16")
    for dtype in LOADS:
        found = checklist(folder, name, dtype=dtype)
        argument = dtype if dtype in ("omitted", "auto") else getattr(torch, dtype)
        assert {found.loads} == dtypes_of(load(name, argument)), dtype
        assert transformers.__version__ in found["load"].found
        by_path = checklist(folder, checkpoints.get(name), dtype=argument)
        assert by_path.lines[1:] == found.lines[1:]


class Record(NamedTuple):
    """What ``make matrix`` measured under a Transformers version."""

    version: str
    rows: list[dict[str, str]]

    def having(self, **wanted):
        return [row for row in self.rows if all(row[key] == x for key, x in wanted.items())]


@pytest.fixture(scope="module", params=["4", "5"])
def recorded(request):
    stem = ROOT / "helpers" / "data" / "matrix" / f"transformers-{request.param}"
    version = json.loads(stem.with_suffix(".json").read_text("utf-8"))["versions"]["transformers"]
    with stem.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return Record(version, list(csv.DictReader(file)))


def test_predicted_dtype_is_the_one_that_was_recorded_under_each_version(saved, recorded):
    measured = recorded.having(then="plain", attention="sdpa")
    seen = set()
    for row in measured:
        name, how, loaded = row["checkpoint"], row["load"], row["loaded"].split()[-1]
        default = "bfloat16" if how == "set_default_dtype(bfloat16)" else None
        dtype = "omitted" if default else how
        if dtype not in LOADS:  # torch_dtype=, which is another spelling
            continue
        assert len(row["loaded"].split()) == 2
        with state.default_dtype(default):
            found = checklist(
                saved("bf16"), name, dtype=dtype, transformers_version=recorded.version
            )
            other = "5.0" if recorded.version.startswith("4") else "4.57.6"
            line = checklist(saved("bf16"), name, dtype=dtype, transformers_version=other)["load"]
        assert found.loads == loaded, row
        four = recorded.version.startswith("4")
        assert f"{loaded} with {'Transformers 4' if four else '5'}" in line.found
        seen.add((name, how))
    assert len(seen) == len(NAMES) * (len(LOADS) + 1)


def test_line_on_inference_fails_where_flash_attention_was_recorded_to(saved, recorded):
    seen = set()
    for then, dtype in (("plain", None), ("LoRA", None), ("DoRA", None), ("autocast", "bfloat16")):
        for row in recorded.having(then=then, attention="flash_attention_2"):
            if row["load"] not in LOADS:
                continue
            found = checklist(
                saved("bf16"),
                row["checkpoint"],
                dtype=row["load"],
                autocast=dtype,
                transformers_version=recorded.version,
            )
            assert found["inference computes in"].ok is (row["error"] == ""), row
            seen.add(row["error"])
    assert seen == {"", "FlashAttention only support fp16 and bf16 data type"}


@pytest.mark.parametrize(
    ("version", "loads"), [("4.30", "float32"), ("5.0.0rc0", "float32"), ("5.0.0rc1", "bfloat16")]
)
def test_omitted_dtype_became_auto_with_the_second_candidate_of_5(saved, version, loads):
    found = checklist(saved("bf16"), "bf16", transformers_version=version)
    assert found.loads == loads


@pytest.mark.parametrize("dtype", ["omitted", "auto"])
def test_default_dtype_counts_where_it_does(saved, dtype):
    with state.default_dtype("bfloat16"):
        found = checklist(saved("bf16"), "fp32", dtype=dtype)
        assert {found.loads} == dtypes_of(load("fp32", dtype))


@pytest.fixture(params=["one file", "two files", "two files, other order"])
def mixed(request, tmp_path):
    """A checkpoint of several dtypes whose config.json says nothing."""
    folder = shutil.copytree(checkpoints.get("undeclared"), tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    rest = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    if request.param == "one file":
        save_file(rest | norms, folder / "model.safetensors", {"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": rest, "model-2.safetensors": norms}
    if "other order" in request.param:
        parts = {"model-1.safetensors": norms, "model-2.safetensors": rest}
    for name, part in parts.items():
        save_file(part, folder / name, {"format": "pt"})
    save_file({"unused": torch.ones(1, dtype=torch.float64)}, folder / "consolidated.safetensors")
    index = {
        "metadata": {},
        "weight_map": {tensor: name for name, part in parts.items() for tensor in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def test_several_files_and_dtypes(saved, mixed):
    found = checklist(saved("bf16"), mixed, dtype="auto")
    assert {found.loads} == dtypes_of(load(mixed))
    assert found["base's tensors"].found == (
        "bfloat16 (31), float32 (7) on file; config.json says nothing"
    )


def test_torch_dtype_is_read_where_an_older_version_wrote_it(saved, tmp_path):
    folder = shutil.copytree(checkpoints.get("undeclared"), tmp_path / "old")
    checkpoints.edit_config(folder, torch_dtype="float16")
    found = checklist(saved("bf16"), folder, dtype="auto")
    assert {found.loads} == dtypes_of(load(folder)) == {"float16"}


def test_weights_without_a_safetensors_file_are_unknown(saved, tmp_path):
    folder = shutil.copytree(checkpoints.get("undeclared"), tmp_path / "old")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = checklist(saved("bf16"), folder, dtype="auto", trained_in="bfloat16")
    marks = {line.name: line.ok for line in found.lines}
    assert found.loads is None
    assert not found.ok
    unknown = ["base's tensors", "load", "inference computes in", "same as in training", "merging"]
    assert [name for name, ok in marks.items() if ok is None] == unknown
    assert checklist(saved("bf16"), folder, dtype="float16").loads == "float16"


# What the matrix products compute in, and what FlashAttention and a merge make of it.


class Products(TorchDispatchMode):
    """The dtypes of the operands of the products with weights."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {CODES[x.dtype] for x in args[-2:]}
        return func(*args, **(kwargs or {}))


PAIRS = [(w, a) for w in (*HALF, "float32") for a in (None, *HALF)]


def autocast(dtype):
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, dtype))


@pytest.mark.parametrize(("weights", "autocast_dtype"), PAIRS)
def test_computing_dtype_is_the_one_of_the_products(saved, weights, autocast_dtype):
    model = attach(load(dtype=weights), saved("bf16"))
    found = checklist(saved("bf16"), "bf16", dtype=weights, autocast=autocast_dtype)
    live = checklist(model, model, autocast=autocast_dtype)
    products = Products()
    with torch.no_grad(), autocast(autocast_dtype), model.disable_adapter(), products:
        model(IDS)
    assert products.dtypes == {found.computes} == {live.computes}


@pytest.mark.skipif(not FIVE, reason="under 4 it is switched on before the first import: recorded")
@pytest.mark.parametrize(("weights", "autocast_dtype"), PAIRS)
def test_line_on_inference_fails_where_flash_attention_does(saved, weights, autocast_dtype):
    found = checklist(saved("bf16"), "bf16", dtype=weights, autocast=autocast_dtype)
    line = found["inference computes in"]
    error = None
    with state.as_before():
        backend.activate()
        model = attach(load(dtype=weights, attention="flash_attention_2"), saved("bf16"))
        with torch.inference_mode(), autocast(autocast_dtype):
            try:
                model(IDS)
            except RuntimeError as raised:
                error = raised
    assert line.ok is (error is None)
    if error is not None:
        assert str(error) == "FlashAttention only support fp16 and bf16 data type"
        assert "FlashAttention refuses" in line.found
        assert "dtype=torch.bfloat16" in line.fix


@pytest.mark.parametrize(("weights", "autocast_dtype"), PAIRS)
def test_line_on_merging_says_what_a_merge_saves_and_auto_loads(
    saved, tmp_path, weights, autocast_dtype
):
    found = checklist(saved("bf16"), "bf16", dtype=weights, autocast=autocast_dtype)
    line = found["merging"]
    attach(load(dtype=weights), saved("bf16")).merge_and_unload().save_pretrained(tmp_path / "m")
    (again,) = dtypes_of(load(tmp_path / "m", "auto"))
    assert line.found.startswith(f'keeps {again}, which "auto" then loads')
    assert line.ok is (again == found.computes and again in HALF)


# The same as in training?


@pytest.mark.parametrize("trained", [None, *HALF, "float32"])
@pytest.mark.parametrize("computes", [*HALF, "float32"])
def test_parity(saved, trained, computes):
    found = checklist(saved("bf16"), "bf16", dtype=computes, trained_in=trained)
    line = found["same as in training"]
    assert line.ok is (None if trained is None else trained == computes)
    assert found.ok is (trained == computes and computes in HALF)
    overflows = trained in ("bfloat16", "float32") and computes == "float16"
    assert ("65504" in line.found) is overflows
    if line.ok is False:
        assert f"run inference in {trained}" in line.fix


def test_logits_move_where_the_line_says_so(saved):
    found = {
        dtype: logits(attach(load(dtype=dtype), saved("bf16"))).float()
        for dtype in (*HALF, "float32")
    }
    assert not torch.equal(found["bfloat16"], found["float16"])
    assert not torch.equal(found["bfloat16"], found["float32"])
    assert not torch.equal(found["float16"], found["float32"])
    overflowing = attach(load("overflow", torch.float16), saved("bf16"))
    assert not logits(overflowing).isfinite().all()
    assert logits(attach(load("overflow"), saved("bf16"))).isfinite().all()


def test_an_adapter_does_not_store_the_dtype_of_training(saved, tmp_path):
    """From a base in one dtype and in another, the folders differ in the numbers alone."""
    contents = []
    for dtype in ("bfloat16", "float32"):
        adapted(load(dtype=dtype)).save_pretrained(tmp_path / dtype)
        files = {f.name: f.read_bytes() for f in (tmp_path / dtype).iterdir()}
        says = json.loads(files.pop("adapter_config.json"))
        says["target_modules"].sort()
        del files["adapter_model.safetensors"]
        contents.append((says, files, read(tmp_path / dtype).tensors))
    assert contents[0] == contents[1]
    unknown = checklist(saved("bf16"), "bf16")["same as in training"]
    assert unknown.ok is None
    assert "trained_in=" in unknown.fix


# The other lines.


def test_fit_is_that_of_attach(saved):
    for name, base in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("dora", "overflow")):
        line = checklist(saved(name), base)["adapter fits base"]
        assert line.ok is True
        assert repr(base) in line.found
        attach(load(base), saved(name))
    for name, base in (("fp16", "bf16"), ("bf16", "fp16"), ("llama", "bf16"), ("deep", "bf16")):
        line = checklist(saved(name), base)["adapter fits base"]
        assert line.ok is False
        with pytest.raises(PlanError) as caught:
            attach(load(base), saved(name))
        assert line.found.split(";")[0].removeprefix("no, ") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("bf16", "float32 (42)"), ("16 bit", "bfloat16 (42), attached as float32")],
)
def test_adapter_tensors_on_file_and_attached(saved, name, words):
    assert checklist(saved(name), "bf16")["adapter's tensors"].found == words
    model = attach(load(), saved(name))
    attached = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {p.dtype for p in attached} == {torch.float32}
    assert checklist(model, "bf16")["adapter's tensors"].found == f"float32 ({len(attached)})"


def test_live_model_is_measured_and_not_believed(saved):
    model = attach(load(), saved("bf16"))
    assert checklist(model, model, trained_in="bfloat16").ok
    model.float()
    assert model.config.dtype is torch.bfloat16  # so the config would mislead
    found = checklist(saved("bf16"), model, trained_in="bfloat16")
    assert (found.loads, found.computes) == ("float32", "float32")
    assert found["base's tensors"].found == "float32 (38), measured"
    assert found["inference computes in"].ok is False
    assert "model.to(torch.bfloat16)" in found["inference computes in"].fix
    assert checklist(model, model, trained_in="bfloat16").lines[1:] == found.lines[1:]


def test_live_model_of_several_dtypes(saved):
    model = load()
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    found = checklist(saved("bf16"), model, trained_in="bfloat16")
    assert found["base's tensors"].ok is None
    assert "float32 (7)" in found["base's tensors"].found
    assert found.computes == "bfloat16"
    assert not found.ok
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        logits(model)
    assert checklist(saved("bf16"), model, autocast="bfloat16")["base's tensors"].ok is True
    model.model.layers[0].self_attn.q_proj.float()
    found = checklist(saved("bf16"), model)
    assert found.computes is None
    assert found["inference computes in"].ok is False


def test_live_adapter_is_compared_with_a_folder(saved):
    model = attach(load(), saved("bf16"))
    assert checklist(model, "fp32")["adapter fits base"].ok is True
    line = checklist(model, "fp16")["adapter fits base"]
    assert line.ok is False
    assert "(64, 128) in the model and (128, 128) in the adapter" in line.found


def test_quantised_base(bitnet, saved):
    for base in (bitnet, load(bitnet)):
        found = checklist(saved("bf16"), base, trained_in="bfloat16", autocast="bfloat16")
        assert found["merging"].ok is False
        assert "bitnet" in found["merging"].found
        assert found["inference computes in"].ok is None
        assert found.computes is None


def test_config_that_asks_for_flash_attention_needs_none_to_be_looked_at(saved, tmp_path):
    folder = shutil.copytree(checkpoints.get("bf16"), tmp_path / "flash")
    for key in ("attn_implementation", "_attn_implementation"):
        checkpoints.edit_config(folder, **{key: "flash_attention_2"})
    before = dict(os.environ)
    assert checklist(saved("bf16"), folder)["adapter fits base"].ok is True
    assert os.environ == before


def test_base_that_cannot_be_built_leaves_the_fit_open(saved, tmp_path):
    folder = shutil.copytree(checkpoints.get("bf16"), tmp_path / "new")
    checkpoints.edit_config(folder, model_type="of-the-future")
    line = checklist(saved("bf16"), folder)["adapter fits base"]
    assert line.ok is None
    assert "\n" not in str(line.found)


def test_whole_checklist_as_text(saved):
    found = checklist(saved("bf16"), "fp32", trained_in=torch.bfloat16, autocast=torch.bfloat16)
    assert str(found).splitlines() == [
        "[OK] adapter fits base: in every shape; the base is 'fp32', and the adapter was trained"
        " on 'bf16'",
        "[OK] adapter's tensors: float32 (42)",
        "[OK] base's tensors: float32 (38) on file; config.json says float32",
        "[OK] load: without dtype: float32 with Transformers 4, float32 with 5 (this is"
        f" {transformers.__version__})",
        "[OK] inference computes in: bfloat16, by autocast over float32 weights",
        "[OK] same as in training: yes, bfloat16",
        '[FAIL] merging: keeps float32, which "auto" then loads, and inference without autocast'
        " computes in it",
        "       fix: load the base with dtype=torch.bfloat16 before you merge",
    ]
    assert repr(found) == str(found)
    assert str(Line("name", "found", None, "do it")) == "[?] name: found\n       fix: do it"


def test_every_line_says_what_to_do_unless_it_is_ok(saved):
    for name in NAMES:
        for trained in (None, "float16", "float32"):
            for line in checklist(saved("bf16"), name, trained_in=trained).lines:
                assert bool(line.ok) or line.fix, line
                assert "\n" not in line.found + line.fix


def test_ok_wants_every_line_ok():
    good, bad, unknown = Line("a", "x"), Line("b", "x", False, "y"), Line("c", "x", None, "y")
    assert Checklist((good, good), None, None).ok
    assert not Checklist((good, bad), None, None).ok
    assert not Checklist((good, unknown), None, None).ok


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"trained_in": "int8"}, ["trained_in='int8'", "'bfloat16'"]),
        ({"trained_in": "auto"}, ["trained_in='auto'"]),
        ({"dtype": None}, ["dtype=None", "'omitted'"]),
        ({"dtype": "bf16"}, ["dtype='bf16'", "'bfloat16'"]),
        ({"autocast": "float32"}, ["autocast='float32'"]),
        ({"transformers_version": "five"}, ["transformers_version='five'", "'4.57.6'"]),
        ({"base": "no/such-model"}, ["The base 'no/such-model' is not here", "'bf16'"]),
        ({"base": "a\0b"}, ["is not here"]),
        ({"adapter": "no-such-folder"}, ["There is no folder 'no-such-folder'"]),
        ({"adapter": torch.nn.Linear(2, 2)}, ["Linear without a LoRA"]),
    ],
)
def test_bad_argument_is_one_sentence(saved, wrong, parts):
    arguments = {"adapter": saved("bf16"), "base": "bf16", **wrong}
    with pytest.raises(PlanError) as caught:
        checklist(arguments.pop("adapter"), arguments.pop("base"), **arguments)
    assert_sentence(caught, *parts)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[]"),
        ("model.safetensors", "version"),
        ("model.safetensors.index.json", '{"weight_map": []}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        ("model.safetensors.index.json", "{"),
    ],
)
def test_damaged_base_is_one_sentence(saved, tmp_path, file, text):
    folder = shutil.copytree(checkpoints.get("bf16"), tmp_path / "base")
    if "index" in file:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / file).write_text(text, "utf-8")
    with pytest.raises(PlanError) as caught:
        checklist(saved("bf16"), folder)
    assert_sentence(caught, "copy or")


def test_checklist_leaves_the_process_as_it_was(saved):
    environment, random = dict(os.environ), torch.get_rng_state()
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    with contextlib.suppress(PlanError):
        checklist(saved("gpt2"), "bf16")
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), random)
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (default, threads)
