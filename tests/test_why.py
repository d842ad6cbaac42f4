"""The live doctor: exceptions that real models raised, and models before they fail."""

import contextlib
import io
import re
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from IPython.core.interactiveshell import InteractiveShell
from kernels import get_kernel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from helpers import checkpoints, diagnose, why

HEADLINE = "RuntimeError: FlashAttention only support fp16 and bf16 data type"

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def failing(one_thread, activated):
    def load(dtype):
        return AutoModelForCausalLM.from_pretrained(
            checkpoints.get("bf16"), dtype=dtype, attn_implementation="flash_attention_2"
        )

    return load


def raised_by(model, **inputs):
    try:
        model(**(inputs or {"input_ids": IDS}))
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


def shown(diagnosis, what):
    return {one.text: one.means for one in diagnosis.evidence if one.what == what}


def test_why_reads_the_frames(failing):
    found = why(raised_by(failing(torch.float32)))
    assert (found.cause, found.certain) == ("weights-fp32", True)
    frames = shown(found, "frame")
    assert "hidden_states float32" in frames["model.layers.0.self_attn (forward)"]
    assert "target_dtype float32" in frames["model.layers.0.self_attn (flash_attention_forward)"]
    assert list(shown(found, "first float32")) == ["model: inputs_embeds"]
    assert list(shown(found, "autocast")) == ["off in this call"]
    # Transformers puts the kernel that it takes into the config.
    assert shown(found, "config") == {
        "Qwen2ForCausalLM": "dtype float32, attn_implementation kernels-community/flash-attn2"
    }
    assert found.fixes[0].versions.startswith("dtype= is right for Transformers")


def test_who_cast_a_frozen_model_is_not_in_the_frames(failing):
    model = failing(torch.bfloat16).float().requires_grad_(False)
    found = why(raised_by(model))
    assert (found.cause, found.certain) == (None, False)
    assert found.candidates == ("kbit-prep", "weights-fp32")
    assert shown(found, "not seen")
    assert "# weights-fp32: " in found.next_check
    assert "kbit-prep" not in why(raised_by(model.requires_grad_(True))).candidates


def test_code_that_prepares_for_kbit_training_is_seen(failing):
    names = {"model": failing(torch.bfloat16), "ids": IDS}
    with pytest.raises(RuntimeError, match="fp16 and bf16") as caught:
        exec(
            "from peft import prepare_model_for_kbit_training\n"
            "prepare_model_for_kbit_training(model)(input_ids=ids)",
            names,
        )
    assert why(caught.value).cause == "kbit-prep"


def test_why_after_training_says_autocast(failing):
    model = failing(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert why(raised_by(model.eval())).cause == "missing-autocast"


class Attention(torch.nn.Module):
    """One without the rescue cast, as code that comes with a checkpoint often has it."""

    def __init__(self, change=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(32, 32) for _ in range(3))
        self.q_norm = torch.nn.RMSNorm(16)
        self.change = change or (lambda q: q)

    def forward(self, hidden_states):
        shape = (*hidden_states.shape[:2], 2, 16)
        q = self.q_norm(self.q_proj(hidden_states).view(shape))
        k, v = self.k_proj(hidden_states).view(shape), self.v_proj(hidden_states).view(shape)
        return self.flash(self.change(q), k, v)

    def flash(self, q, k, v):
        return get_kernel("kernels-community/flash-attn2", version=4).flash_attn_func(q, k, v)


class Model(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.embed = torch.nn.Embedding(32, 32)
        self.self_attn = attention

    def forward(self, input_ids):
        return self.self_attn(self.embed(input_ids))


class Widened(torch.nn.Module):
    """An adapter by hand, which does not cast back."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A = torch.nn.Linear(32, 32, dtype=torch.float32)

    def forward(self, x):
        return self.base(x) + self.lora_A(x.float())


class FloatNorm(torch.nn.Module):
    """Multiplies by a float32 weight, as the norms of many models do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.weight * x


def half_model(change=None):
    return Model(Attention(change)).to(torch.bfloat16).eval()


def with_a_float32_lora():
    """PEFT keeps adapters in float32 and casts back what they return, so it is not to blame."""
    model = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj"]), half_model(torch.Tensor.float)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def with_an_adapter_by_hand():
    model = half_model()
    model.self_attn.q_proj = Widened(model.self_attn.q_proj)
    model.self_attn.q_norm = torch.nn.Identity()
    return model


def with_a_float32_norm():
    model = half_model()
    model.self_attn.q_norm = FloatNorm()
    return model


@pytest.mark.usefixtures("one_thread", "activated")
@pytest.mark.parametrize(
    ("make", "label", "because"),
    [
        (lambda: half_model(torch.Tensor.float), "upcast-module", "between them and the kernel"),
        (with_a_float32_lora, "upcast-module", "between them and the kernel"),
        (with_an_adapter_by_hand, "adapter-fp32", "self_attn.q_proj makes float32"),
        (with_a_float32_norm, "upcast-module", "self_attn.q_norm makes float32"),
    ],
    ids=["cast", "float32-lora", "adapter-by-hand", "float32-norm"],
)
def test_the_modules_of_the_attention_are_asked(make, label, because):
    model = make().train()
    modes = {name: module.training for name, module in model.named_modules()}
    before = torch.get_rng_state()
    found = why(raised_by(model, input_ids=IDS))
    assert (found.cause, found.certain) == (label, True)
    assert because in " ".join(shown(found, "model"))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("one_thread", "activated")
def test_a_v_that_is_half_of_float32_weights_shows_autocast():
    model = Model(Attention(torch.Tensor.float)).train()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS)
    except RuntimeError as error:
        found = why(error)
    assert found.cause == "upcast-module"


@pytest.mark.usefixtures("one_thread", "activated")
def test_frames_of_autocast_are_read():
    model = Model(Attention(torch.Tensor.float)).train()
    step = torch.autocast("cpu", torch.bfloat16)(lambda: model(input_ids=IDS))
    try:
        step()
    except RuntimeError as error:
        found = why(error)
    assert found.cause == "upcast-module"
    assert list(shown(found, "autocast")) == ["on in this call"]


def test_modules_that_cannot_be_asked_leave_candidates():
    class Odd(Attention):
        def forward(self, hidden_states):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    model = Model(Odd()).to(torch.bfloat16)
    model.self_attn.q_proj = Widened(model.self_attn.q_proj)
    model.to("meta")
    error = raised_by(model, input_ids=IDS.to("meta"))
    found = why(error)
    assert found.certain is False
    assert {"upcast-module", "adapter-fp32"} == set(found.candidates)
    assert shown(found, "not seen")


def test_without_an_exception_why_says_so(monkeypatch):
    monkeypatch.delattr(sys, "last_exc", raising=False)
    monkeypatch.delattr(sys, "last_value", raising=False)
    with pytest.raises(ValueError, match="no exception to explain"):
        why()


def test_a_model_is_diagnosed_before_it_fails(failing):
    found = diagnose(failing(torch.float32))
    assert found.cause == "weights-fp32"
    assert "first float32" in [one.what for one in found.evidence]
    assert "gpu-too-old" not in found.ruled_out  # the reference kernel has asked no GPU
    healthy = diagnose(failing(torch.bfloat16))
    assert (healthy.cause, healthy.is_failure) == (None, False)


@pytest.mark.usefixtures("one_thread", "activated")
@pytest.mark.parametrize(
    ("make", "label"),
    [
        (lambda: half_model(torch.Tensor.float), "upcast-module"),
        (with_a_float32_lora, "upcast-module"),
        (with_an_adapter_by_hand, "adapter-fp32"),
        (with_a_float32_norm, "upcast-module"),
    ],
)
def test_the_first_float32_of_an_x_ray_decides(make, label):
    found = diagnose(make(), {"input_ids": IDS})
    assert (found.cause, found.certain) == (label, True)


def test_float32_features_of_a_half_model_are_inputs():
    class Features(Attention):
        def forward(self, features):
            q = features.view(1, 4, 2, 16)
            return self.flash(q, q, q)

    found = diagnose(Features().to(torch.bfloat16), {"features": torch.zeros(1, 4, 32)})
    assert found.cause == "inputs-fp32"


def test_why_speaks_the_language_that_it_is_asked_for(failing):
    error = raised_by(failing(torch.float32))
    chinese = why(error, language="zh-CN")
    assert chinese.language == "zh-CN"
    assert chinese.cause == why(error).cause
    assert why(error).language == "en"
    with pytest.raises(ValueError, match="no sentences in 'tlh'"):
        why(error, language="tlh")


def test_the_magic_explains_the_last_exception(monkeypatch):
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "helpers.doctor.live")
    monkeypatch.setattr(
        sys, "last_exc", RuntimeError("query and key must have the same dtype"), raising=False
    )
    assert shell.run_line_magic("why", "").cause == "mixed-qkv-dtype"
    assert shell.run_line_magic("why", "zh-CN").language == "zh-CN"
    InteractiveShell.clear_instance()


@pytest.fixture
def accelerated():
    """Accelerators of other settings, in a process that may have had one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda: Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def checked(model, call=lambda model, ids: model(ids)):
    """What the lines print that the doctor asks for, run as they stand."""
    asked = diagnose(HEADLINE)
    ids = torch.arange(6)[None]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(asked.next_check, {"model": model})
        exec(asked.next_check, {"model": model})  # a cell that is run twice
        for _ in range(2):  # what does not change is printed once
            with contextlib.suppress(RuntimeError):
                call(model, ids)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 2
    lines = printed.getvalue().splitlines()
    half = len(lines) // 2
    assert lines[:half] == lines[half:]
    assert half in (1, 2)  # the second is the name of a weight
    return "\n".join(lines[:half])


def norms_in_float32(model):
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name or "lm_head" in name:
            parameter.data = parameter.data.float()
    return model


def with_lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))


@pytest.mark.parametrize(
    ("dtype", "change", "told", "label"),
    [
        (torch.float32, lambda model: model, "", "weights-fp32"),
        (torch.float32, lambda model: model.train(), "", "missing-autocast"),
        (torch.float32, with_lora, "I fine-tune it.", "missing-autocast"),
        (torch.bfloat16, lambda model: model, "", "upcast-module"),
        (torch.bfloat16, lambda model: model, "load_in_4bit=True", "quantization-compute-dtype"),
        (torch.bfloat16, lambda model: model, "model(inputs_embeds=x)", "inputs-fp32"),
        (torch.bfloat16, norms_in_float32, "", "kbit-prep"),
        (torch.bfloat16, lambda m: with_lora(norms_in_float32(m)), "I train it.", "kbit-prep"),
    ],
)
@pytest.mark.parametrize("alone", [False, True], ids=["below-the-error", "alone"])
def test_the_doctor_reads_what_its_own_check_prints(failing, dtype, change, told, label, alone):
    printed = checked(change(failing(dtype)))
    error = "" if alone else f"{HEADLINE}\n"
    found = diagnose(f"{told}\n{error}{printed}")
    assert (found.cause, found.certain) == (label, True)
    assert printed.splitlines()[0] in [one.text for one in found.evidence]


def test_a_float32_adapter_is_not_yet_to_blame(failing):
    """PEFT keeps adapters in float32 by default and casts back what they return."""
    printed = checked(with_lora(failing(torch.bfloat16)))
    found = diagnose(printed)
    assert (found.cause, found.certain) == (None, False)
    assert found.candidates[:2] == ("adapter-fp32", "upcast-module")
    assert "disable_adapter()" in found.next_check
    assert not {"weights-fp32", "missing-autocast", "kbit-prep"} & set(found.candidates)


@pytest.mark.parametrize(
    ("inside", "label"), [(True, "upcast-module"), (False, "missing-autocast")]
)
def test_its_own_check_says_autocast_as_the_model_sees_it(failing, accelerated, inside, label):
    """accelerate puts the model's forward inside autocast, and what calls it outside."""
    accelerator = accelerated()
    model = accelerator.prepare(failing(torch.float32).train())
    printed = checked(model if inside else accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    found = diagnose(f"bf16=True is set.\n{HEADLINE}\n{printed}")
    assert (found.cause, found.certain) == (label, True)
    assert "enable-mixed-precision" not in [fix.label for fix in found.fixes]


@pytest.mark.parametrize("lora", [True, False])
def test_its_own_check_says_what_was_at_the_call_that_failed(
    failing, accelerated, tmp_path, capsys, lora
):
    """Training runs under autocast; a callback generates with what is inside of a PEFT model, and
    with all of another model, whose forward has it."""
    del accelerated  # the Trainer makes its own

    class Sample(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.generate(IDS, max_new_tokens=1)

    model = failing(torch.float32)
    flags = {"use_cpu": True, "bf16": True, "max_steps": 1, "report_to": [], "disable_tqdm": True}
    trainer = Trainer(
        with_lora(model) if lora else model,
        TrainingArguments(tmp_path, save_strategy="no", **flags),
        train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}],
        callbacks=[Sample()],
    )
    exec(diagnose(HEADLINE).next_check, {"model": trainer.model})
    fails = pytest.raises(RuntimeError, match="only support fp16 and bf16")
    with fails if lora else contextlib.nullcontext():
        trainer.train()
    printed = capsys.readouterr().out
    assert set(re.findall(r"autocast (\w+)", printed)) == ({"True", "False"} if lora else {"True"})
    if lora:
        found = diagnose(f"{HEADLINE}\n{printed}")
        assert (found.cause, found.certain) == ("missing-autocast", True)
        assert "autocast False" in found.evidence[-1].text


@pytest.mark.parametrize("error", ["", f"{HEADLINE}\n"])
def test_what_mixed_precision_is_meant_to_be_is_no_failure_by_itself(failing, accelerated, error):
    printed = checked(accelerated().prepare(failing(torch.float32)))
    found = diagnose(error + printed)
    assert found.cause == ("upcast-module" if error else None)
    assert found.is_failure is bool(error)


def test_a_part_in_float32_is_not_all(failing):
    model = failing(torch.bfloat16)
    model.lm_head.float()
    model.model.layers[0].self_attn.q_proj.float()
    found = diagnose(f"{HEADLINE}\n{checked(model)}")
    assert (found.cause, found.certain) == (None, False)
    assert set(found.candidates[:2]) == {"weights-fp32", "upcast-module"}
    assert "which modules are float32" in found.next_check


def test_its_own_check_says_that_embeddings_came_as_float32(failing):
    def call(model, ids):
        model(inputs_embeds=model.get_input_embeddings()(ids).float())

    found = diagnose(f"{HEADLINE}\n{checked(failing(torch.bfloat16), call)}")
    assert (found.cause, found.certain) == ("inputs-fp32", True)


def test_one_norm_in_float32_is_no_preparation(failing):
    model = failing(torch.bfloat16)
    model.model.norm.float()
    found = diagnose(f"{HEADLINE}\n{checked(model)}")
    assert (found.cause, found.certain) == ("upcast-module", True)


def test_a_model_is_diagnosed_in_chinese_to_the_last_sentence(failing):
    """What is left in Latin letters are names, dtypes, messages, code and lines of code."""
    for dtype in (torch.float32, torch.bfloat16):
        found = diagnose(failing(dtype), language="zh-CN")
        ours = [one.means for one in found.evidence if one.what == "X-ray"]
        ours += [one.text for one in found.evidence if one.what == "第一个 float32"]
        assert len(ours) == (2 if dtype is torch.float32 else 1)
        for sentence in [found.summary, *ours]:
            assert re.search("[\u4e00-\u9fff]", sentence), sentence
            assert not re.search(r"\b(?:the|passes?|fails|ends in|got)\b", sentence), sentence
