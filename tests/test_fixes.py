"""The fixes: every form can be pasted, and those that need no GPU mend what fails, for real."""

import ast
import inspect
import itertools
import re
import shlex
import textwrap
from types import SimpleNamespace

import pytest
import torch
import yaml
from kernels import get_kernel
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from helpers import checkpoints, diagnose
from helpers.doctor.data import load
from helpers.doctor.evidence import read
from helpers.doctor.remedies import remedies

DATA = load("fixes.json")
REFUSED = "FlashAttention only support fp16 and bf16 data type"
HEADLINE = f"RuntimeError: {REFUSED}"
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def frames(*files):
    """The lines of a traceback, outermost first: files, each with a function behind a colon."""
    told = [one.partition(":") for one in files]
    return "\n".join(
        f'  File "/v/site-packages/{file}", line 7, in {function or "forward"}'
        for file, _, function in told
    )


KERNEL = "flash_attn/flash_attn_interface.py:flash_attn_func"
# What a text says beside its cause.
LIBRARIES = {
    "none": "",
    "llamafactory": "llamafactory-cli train x.yaml",
    "swift": "swift sft --model x",
    "swift-infer": "swift infer --model x",
    "axolotl": "axolotl train x.yaml",
    "unsloth": "unsloth 2025.3",
    "trl": "SFTTrainer(model)",
    "sentence-transformers": "CrossEncoder(path)",
    "vllm": "vllm.LLM",
    "accelerate": "accelerate launch train.py",
}
CASES = {
    "none": "",
    "cast": "model = model.float()",
    "loop": "scaler = torch.cuda.amp.GradScaler()",
    "generate": "training is fine, only during generation it fails; model.generate(**inputs)",
    "evaluation": "trainer.train() is fine\n" + frames("transformers/trainer.py:evaluate"),
    "own": frames("/srv/net/attention.py", KERNEL),
    "diffusers": frames("diffusers/models/attention_dispatch.py", KERNEL),
    "transformers": frames("transformers/modeling_flash_attention_utils.py", KERNEL),
    "embeds": "model(inputs_embeds=x)",
    "wide": "got query.dtype: float key.dtype: float and value.dtype: c10::BFloat16 instead",
    "pipeline": 'pipe = pipeline("automatic-speech-recognition", model=path)',
    "served": "vllm serve path --port 8000",
    "vision": 'model = AutoModelForImageTextToText.from_pretrained(path, device_map="cuda")',
    "encoder": 'SentenceTransformer(path, model_kwargs={"attn_implementation": "x"})',
    "fp8": "load Qwen3-8B-FP8",
    "fp16": "TrainingArguments(output_dir='x', fp16=True)",
    "new": "transformers 5.22.2",
    "old": "transformers 4.44.2",
}


def given():
    """Every fix of every cause, for each library and each case."""
    for cause, (library, called), (case, said) in itertools.product(
        DATA["for"], LIBRARIES.items(), CASES.items()
    ):
        for fix in remedies(cause, read(f"{called}\n{said}\n{HEADLINE}")):
            yield (fix.label, fix.form, fix.code), f"{cause}, {library}, {case}"


@pytest.fixture(scope="module")
def fixes():
    """What is said, once each, with a case in which it is."""
    return dict(given())


# Names that the person's own code defines, or that its libraries export.
HERE = {
    *("torch", "path", "new_path", "model", "inputs", "batch", "tokenizer", "texts", "trainer"),
    *("q", "k", "v", "x", "cos", "sin", "output", "input", "layer", "causal", "pipe"),
    *("accelerator", "prepare_model_for_kbit_training", "AutoModelForCausalLM", "CrossEncoder"),
    *("AutoModelForImageTextToText", "SentenceTransformer", "inputs_embeds", "pipeline"),
    *("BitsAndBytesConfig", "SFTConfig", "TrainingArguments", "FastLanguageModel", "LLM"),
}
COMMANDS = ("pip install", "pip uninstall", "python -m pip", "python -c", "nvidia-smi")
COMMANDS += ("swift sft", "swift infer", "accelerate launch", "vllm serve")


def is_python(code):
    tree = ast.parse(code)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    stored |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert {node.id for node in names} <= HERE | stored | {"print"}
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert Ellipsis not in constants


def is_shell(code):
    for line in code.split("\n"):
        words = shlex.split(line, comments=True)
        assert line.startswith(COMMANDS)
        assert "..." not in line
        if "-c" in words:
            ast.parse(words[words.index("-c") + 1])


def is_yaml(code):
    found = yaml.safe_load(code)
    assert isinstance(found, dict)
    assert all(re.fullmatch(r"\w+", key) for key in found)
    assert all(isinstance(value, (str, bool)) for value in found.values())
    assert "..." not in code


CHECKS = {"python": is_python, "shell": is_shell, "yaml": is_yaml}


def test_every_fix_can_be_pasted(fixes):
    for (label, form, code), where in fixes.items():
        written = DATA["fixes"][label].get("in", {}).get(form, "python")
        assert "{" not in re.sub(r"\{\n|\{\"|\{name", "", code), where
        try:
            CHECKS[written](code)
        except Exception as error:
            raise AssertionError(f"{label}, {form} ({where}): {error}\n{code}") from error


def test_every_form_is_for_somebody(fixes):
    told = {(label, form) for label, form, _ in fixes}
    forms = {(label, form) for label, fix in DATA["fixes"].items() for form in fix["code"]}
    assert forms - told == set()
    for fix in DATA["fixes"].values():
        assert {*fix.get("in", ()), *fix.get("titles", ())} <= {*fix["code"]}


def test_every_call_is_somebody_s(fixes):
    wrapped = " ".join(code for label, _, code in fixes if label == "wrap-in-autocast")
    assert [one for one in DATA["calls"].values() if one not in wrapped] == []


# What is said to whom


def first(cause, text, label=None, **more):
    found = remedies(cause, read(f"{text}\n{HEADLINE}"), **more)
    return next(fix for fix in found if label in (None, fix.label))


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("RuntimeError: expected scalar type Half but found Float", "float16"),
        (
            "RuntimeError: Expected query, key, and value to have the same dtype, but got"
            " query.dtype: float key.dtype: c10::Half and value.dtype: c10::Half instead.",
            "float16",
        ),
        (
            "RuntimeError: Input type (torch.cuda.FloatTensor) and weight type"
            " (torch.cuda.HalfTensor) should be the same",
            "float16",
        ),
        ("RuntimeError: mat1 and mat2 must have the same dtype, but got Float and Half", "float16"),
        (
            "RuntimeError: mat1 and mat2 must have the same dtype, but got Float and BFloat16\n"
            "fp16=True",
            "bfloat16",
        ),
        (f"TrainingArguments(output_dir='x', fp16=True)\n{HEADLINE}", "float16"),
        (f"TrainingArguments(output_dir='x', fp16=True, bf16=False)\n{HEADLINE}", "float16"),
        (f"fp16: false\nbf16: true\n{HEADLINE}", "bfloat16"),
        (f"python train.py --fp16 --lr 1 --epochs 3\n{HEADLINE}", "float16"),
        (f"AutoModel.from_pretrained(path, torch_dtype=torch.float16)\n{HEADLINE}", "float16"),
        (f"fp16=True\nAutoModel.from_pretrained(p, torch_dtype=torch.bfloat16)\n{HEADLINE}", "b"),
        (HEADLINE, "bfloat16"),
        (f"an H100\n{HEADLINE}", "bfloat16"),
        ("RuntimeError: FlashAttention only supports Ampere GPUs or newer. Tesla T4", "float16"),
    ],
)
def test_the_half_is_that_of_the_error_or_of_the_code(text, half):
    code = next(fix.code for fix in remedies("weights-fp32", read(text)))
    assert re.search(r"torch\.(b?)float16", code)[0][6:].startswith(half)


def test_a_cast_model_is_told_to_take_the_cast_out():
    for fix in (
        first("weights-fp32", "model = model.float()"),
        first("weights-fp32", "", cast=True),
    ):
        assert (fix.label, fix.form) == ("pass-dtype", "cast")
        assert fix.code.endswith("model = model.to(torch.bfloat16)")
        assert "cast back" in fix.title
    assert first("weights-fp32", "").title == "Say the dtype when the model is loaded"
    found = [fix.label for fix in remedies("weights-fp32", read(HEADLINE), cast=True)]
    assert "convert-checkpoint" not in found


def test_autocast_comes_first_where_it_was_on_before():
    text = "Casting fp32 inputs back to torch.bfloat16\nCasting fp32 inputs back to torch.float32"
    assert first("missing-autocast", text).label == "wrap-in-autocast"
    assert first("missing-autocast", text[:45]).label == "enable-mixed-precision"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (frames("transformers/trainer.py:evaluate", KERNEL), "trainer.evaluate()"),
        ("trainer.train() is fine, it fails only during evaluation", "trainer.evaluate()"),
        (
            frames(
                *(
                    "transformers/trainer.py:evaluate",
                    "transformers/trainer_callback.py:call_event",
                ),
                "my/call.py:on_evaluate",
            ),
            "= model(**inputs)",
        ),
        ("training works, but validate() fails", "= model(**inputs)"),
        ("training works; only during generation it fails", "model.generate(**inputs)"),
        ("model = accelerator.prepare(m)\nmodel.generate(x)", "unwrap_model(model).generate"),
        ("with torch.autocast('cuda'):\n    loss = model(x)", "loss = model(**batch).loss"),
    ],
)
def test_the_call_inside_autocast_is_theirs(text, line):
    assert line in first("missing-autocast", text, "wrap-in-autocast").code


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (frames("diffusers/models/attention_dispatch.py", KERNEL), "pip install -U diffusers"),
        (frames("transformers/models/x.py", KERNEL), "pip install -U transformers"),
        ("unsloth", "pip install -U unsloth"),
        (frames("/src/Wan2.1/wan/modules/attention.py", KERNEL), "pip install -U LIBRARY "),
        ("axolotl\n" + frames("/net/attention.py", KERNEL), "pip install -U LIBRARY "),
        ("accelerate launch train.py", "pip install -U LIBRARY "),
        ("", "pip install -U LIBRARY "),
    ],
)
def test_the_library_that_is_upgraded_made_the_call(text, command):
    assert first("upcast-module", text, "upgrade-library").code.startswith(command)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (frames("/net/attention.py", KERNEL), "own"),
        (frames("cache/modules/transformers_modules/x/modeling_x.py", KERNEL), "own"),
        ("I have a custom attention", "own"),
        (frames("diffusers/models/attention_dispatch.py", KERNEL), "diffusers"),
        (frames("transformers/models/x.py", KERNEL), "default"),
        (frames("torch/nn/modules/module.py", KERNEL), "default"),
        ("", "default"),
    ],
)
def test_another_attention_is_one_for_their_code(text, form):
    assert first("upcast-module", text, "use-other-attention").form == form


def test_versions_are_said_in_few_words():
    assert first("weights-fp32", "").versions == "torch_dtype=, from 4.56 on also dtype="
    assert first("weights-fp32", "transformers 5.22.2").versions.endswith("Transformers >=4.56")


# Fixes that run

pytestmark = pytest.mark.usefixtures("one_thread", "activated")


def code_of(cause, label, text="", **more):
    """The lines of a fix, on the CPU."""
    return first(cause, text, label, **more).code.replace('"cuda"', '"cpu"')


def pasted(code, **names):
    """The names after the lines have run."""
    names = {"torch": torch, **names}
    exec(compile(code, "pasted", "exec"), names)
    return SimpleNamespace(**names)


def loaded(dtype=torch.bfloat16, **more):
    more = {"attn_implementation": "flash_attention_2", **more}
    return AutoModelForCausalLM.from_pretrained(checkpoints.get("bf16"), dtype=dtype, **more)


def refused(call, match=REFUSED):
    with pytest.raises(RuntimeError, match=match):
        call()


def kernel():
    return get_kernel("kernels-community/flash-attn2", version=4).flash_attn_func


def qkv(dtype, heads=4):
    torch.manual_seed(0)
    return [torch.randn(2, 6, heads, 16, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("said", ["transformers 4.44.2", "transformers 5.22.2", ""])
@pytest.mark.parametrize(
    "case",
    [("weights-fp32", "pass-dtype"), ("weights-fp32", "convert-checkpoint")],
    ids=lambda c: c[1],
)
def test_the_dtype_at_load_time(said, case, tmp_path):
    refused(lambda: loaded(torch.float32)(IDS))
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "path": checkpoints.get("bf16")}
    code = code_of(*case, text=said)
    assert said.endswith("5.22.2") == (" dtype=" in code)
    model = pasted(code, **names, new_path=tmp_path).model
    assert model.dtype is torch.bfloat16
    model(IDS)
    if case[1] == "convert-checkpoint":
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        assert again.dtype is torch.bfloat16


def test_the_dtype_of_quantised_layers():
    class Load:
        from_pretrained = staticmethod(lambda path, **given: given)

    code = code_of("quantization-compute-dtype", "pass-dtype", "transformers 5.22.2")
    names = {"AutoModelForCausalLM": Load, "BitsAndBytesConfig": BitsAndBytesConfig, "path": "p"}
    found = pasted(code, **names).model
    assert found["quantization_config"].bnb_4bit_compute_dtype is torch.bfloat16
    assert found["quantization_config"].load_in_4bit
    assert found["dtype"] is torch.bfloat16


def test_a_cast_that_is_taken_back():
    model = loaded().float()
    refused(lambda: model(IDS))
    pasted(code_of("weights-fp32", "pass-dtype", cast=True), model=model).model(IDS)


@pytest.mark.parametrize(
    "said", ["", "training works; only in the callback generation fails", "autocast(x):\n loss = 1"]
)
def test_autocast_around_the_call(said):
    model = loaded(torch.float32)
    inputs = {"input_ids": IDS, "labels": IDS}
    refused(lambda: model(**inputs))
    if "generation" in said:
        inputs = {"input_ids": IDS, "max_new_tokens": 2, "do_sample": False}
    pasted(
        code_of("missing-autocast", "wrap-in-autocast", said),
        **{"model": model, "inputs": inputs, "batch": inputs},
    )


def test_autocast_around_an_evaluation(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(loaded(torch.float32), arguments, eval_dataset=data)
    refused(trainer.evaluate)
    said = frames("transformers/trainer.py:evaluate")
    found = pasted(code_of("missing-autocast", "wrap-in-autocast", said), trainer=trainer)
    assert found.metrics["eval_loss"] > 0


def test_the_arguments_of_a_trainer_are_its_own():
    for text in ("", "fp16=False\nunsloth"):
        code = code_of("missing-autocast", "enable-mixed-precision", text)
        call = ast.parse(code).body[0].value
        assert call.args == []
        named = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
        bound = inspect.signature(TrainingArguments).bind(**named).arguments
        assert bound == {"output_dir": "out", "bf16": True}


@pytest.mark.parametrize("cause", ["inputs-fp32", "matmul-dtype-mismatch"])
def test_inputs_of_two_kinds(cause):
    model = loaded()
    embeds = model.get_input_embeddings()(IDS).detach().float()
    mask = torch.ones_like(IDS)
    refused(lambda: model(inputs_embeds=embeds, attention_mask=mask), "same dtype|dtype")
    code = code_of(cause, "align-dtypes").partition("# or inside")[0]
    names = {"model": model, "inputs": {"inputs_embeds": embeds, "attention_mask": mask}}
    inputs = pasted(code, **names).inputs
    assert {name: x.dtype for name, x in inputs.items()} == {
        "inputs_embeds": torch.bfloat16,
        "attention_mask": torch.int64,
    }
    model(**inputs)
    ids = pasted(code, model=model, inputs={"input_ids": IDS}).inputs
    assert torch.equal(ids["input_ids"], IDS)


def test_inputs_of_a_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.get("bf16"))
    for cause, label in (("inputs-fp32", "align-dtypes"), ("model-on-cpu", "move-to-gpu")):
        names = {"model": loaded(), "inputs": tokenizer("Hello", return_tensors="pt")}
        found = pasted(code_of(cause, label), **names)
        assert found.inputs["input_ids"].dtype is torch.int64
        found.model(**found.inputs)


def test_the_side_of_a_layer():
    layer, x = torch.nn.Linear(4, 4, dtype=torch.bfloat16), torch.randn(2, 4)
    refused(lambda: layer(x), "dtype")
    code = code_of("matmul-dtype-mismatch", "align-dtypes").split("\n")[-1]
    layer(pasted(code, layer=layer, x=x).x)


def test_a_preparation_that_is_undone():
    refused(lambda: prepare_model_for_kbit_training(loaded())(IDS))
    names = {"prepare_model_for_kbit_training": prepare_model_for_kbit_training}
    model = pasted(code_of("kbit-prep", "undo-kbit-upcast"), **names, model=loaded()).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(IDS)


def test_an_adapter_that_is_cast():
    model = get_peft_model(loaded(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    wide = [n for n, p in model.named_parameters() if p.dtype is torch.float32]
    assert wide
    assert all("lora_" in name for name in wide)
    model = pasted(code_of("adapter-fp32", "recast-adapter"), model=model).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(input_ids=IDS)


def test_q_k_and_v_that_are_cast():
    q, k, v = qkv(torch.float32)
    refused(lambda: kernel()(q, k, v))
    line, module = code_of("upcast-module", "cast-qkv-or-module").split("\n# ")
    found = pasted(line, q=q, k=k, v=v)
    kernel()(found.q, found.k, found.v)
    body = textwrap.indent(module.partition("\n")[2], "    ")
    norm = pasted(f"def norm(input):\n    output = input.float()\n{body}").norm
    assert norm(q.bfloat16()).dtype is torch.bfloat16


def test_k_and_v_like_q():
    q, k, v = qkv(torch.float32)
    q = q.bfloat16()
    refused(lambda: kernel()(q, k, v), "same dtype")
    found = pasted(code_of("mixed-qkv-dtype", "align-dtypes"), q=q, k=k, v=v)
    kernel()(found.q, found.k, found.v)


def test_tables_like_their_input():
    x, cos = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    found = pasted(code_of("rope-dtype-mismatch", "align-dtypes"), x=x, cos=cos, sin=cos)
    assert found.cos.dtype is found.sin.dtype is torch.bfloat16


def test_a_last_dimension_that_is_made_contiguous():
    attend = get_kernel("kernels-community/flash-attn2", version=4).flash_attn_with_kvcache
    q, *cache = qkv(torch.bfloat16)  # q, k and v themselves are copied by flash-attn where needed
    k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in cache)
    with pytest.raises(AssertionError, match="contiguous last dimension"):
        attend(q, k, v)
    found = pasted(code_of("noncontiguous-input", "make-contiguous"), q=q, k=k, v=v)
    assert torch.equal(found.k, k)
    attend(found.q, found.k, found.v)


def test_sdpa_of_transformers():
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "path": checkpoints.get("fp32")}
    model = pasted(code_of("weights-fp32", "use-other-attention"), **names).model
    assert model.dtype is torch.float32
    assert model.config._attn_implementation == "sdpa"
    model(IDS)
    old = pasted(code_of("gpu-too-old", "use-other-attention"), **names).model
    assert old.dtype is torch.float16
    old(IDS)


def test_kernels_of_sdpa_that_take_float32():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, inputs = loaded(torch.float32, attn_implementation="sdpa"), {"input_ids": IDS}
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        refused(lambda: model(**inputs), "kernel")
    code = code_of("sdpa-backend-unavailable", "use-other-attention")
    assert pasted(code, model=model, inputs=inputs).output.logits.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_sdpa_in_one_s_own_attention(causal):
    """The oracle is softmax(q k^T / sqrt(dim)) v in float64, in flash-attn's shapes."""
    q, k, v = qkv(torch.float32)
    refused(lambda: kernel()(q, k, v, causal=causal))
    said = frames("/net/attention.py", KERNEL)
    code = code_of("upcast-module", "use-other-attention", said)
    output = pasted(code, q=q, k=k, v=v, causal=causal).output
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    half = kernel()(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=causal)
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.05)


def test_padding_on_the_left():
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.get("bf16"))
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    names = {"tokenizer": tokenizer, "texts": ["Which", "Which dtypes does it accept?"]}
    inputs = pasted(code_of("padding-side", "fix-padding"), **names).inputs
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_a_text_with_a_cast_gets_it_in_the_diagnosis():
    found = diagnose(f"model = model.float()\nno training\n{HEADLINE}")
    assert found.cause == "weights-fp32"
    assert found.fixes[0].form == "cast"
    assert "cast back" in str(found)
