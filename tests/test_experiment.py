"""run() against plain Transformers, and every way a plan can be wrong."""

import ast
import contextlib
import functools
import io
import itertools
import json
import logging
import math
import os
import shutil
import socket
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import backend, checkpoints, experiment, training, view
from helpers.errors import PlanError
from helpers.experiment import resolve, run
from helpers.files import declared_dtype
from helpers.plan import ATTENTION, AUTOCAST, DEFAULT_DTYPES, DTYPES, LoadPlan, snippet
from helpers.steps import STEPS, Step

REFUSED = "FlashAttention only support fp16 and bf16 data type"
RESCUE = "Casting fp32 inputs back to torch.{} for flash-attn compatibility."
NO_FLASH_ATTN = "You do not have `flash_attn` installed, using `kernels-community/flash-attn2`"

pytestmark = pytest.mark.usefixtures("one_thread")


def plan(checkpoint="bf16", dtype="omitted", **others):
    return LoadPlan(checkpoint, dtype, **others)


# Plan, dtype of the loaded weights, dtype at the gate. What Transformers 5 does with each.
TABLE = [
    (plan(), "bfloat16", "bfloat16"),
    (plan(dtype="auto"), "bfloat16", "bfloat16"),
    (plan(dtype="bfloat16"), "bfloat16", "bfloat16"),
    (plan(dtype="float16"), "float16", "float16"),
    (plan(dtype="float32"), "float32", "float32"),
    (plan("fp16"), "float16", "float16"),
    (plan("fp32"), "float32", "float32"),
    (plan("fp32", "auto"), "float32", "float32"),
    (plan("fp32", "bfloat16"), "bfloat16", "bfloat16"),
    (plan("undeclared"), "bfloat16", "bfloat16"),
    (plan("undeclared", "auto"), "bfloat16", "bfloat16"),
    (plan("mislabelled"), "bfloat16", "bfloat16"),
    (plan("overflow"), "bfloat16", "bfloat16"),
    (plan("overflow", "float16"), "float16", "float16"),
    (plan(default_dtype="float16"), "bfloat16", "bfloat16"),
    (plan("fp32", default_dtype="bfloat16"), "float32", "float32"),
    (plan("fp32", autocast="bfloat16"), "float32", "bfloat16"),
    (plan(dtype="float32", autocast="float16"), "float32", "float16"),
    (plan(dtype="float32", attention="sdpa"), "float32", None),
    (plan(dtype="float32", attention="eager"), "float32", None),
    (plan(attention="eager"), "bfloat16", None),
    (plan(after_load=("float",)), "float32", "float32"),
    (plan(after_load=("half",)), "float16", "float16"),
    (plan("fp32", after_load=("bfloat16",)), "bfloat16", "bfloat16"),
    (plan(after_load=("prepare_kbit",)), "float32", "float32"),
    (plan(after_load=("lora", "merge")), "bfloat16", "bfloat16"),
    (plan("fp32", after_load=("lora", "merge", "half")), "float16", "float16"),
    (plan(after_load=("dora", "merge")), "bfloat16", "bfloat16"),
    (plan(dtype="float32", after_load=("dora", "merge")), "float32", "float32"),
    (plan(dtype="float32", after_load=("lora", "merge", "reload")), "float32", "float32"),
    (plan("fp32", "bfloat16", after_load=("half", "reload")), "float16", "float16"),
    (plan("fp32", "bfloat16", keyword="torch_dtype"), "bfloat16", "bfloat16"),
]


def name_of(p):
    parts = [p.checkpoint, p.dtype, p.attention, p.default_dtype, p.autocast, *p.after_load]
    parts += [p.keyword] if p.keyword != "dtype" else []
    return " ".join(str(part) for part in parts if part not in (None, "flash_attention_2"))


each_plan = pytest.mark.parametrize("plan", [row[0] for row in TABLE], ids=name_of)


@functools.cache
def outcome(p):
    return run(p)


@pytest.fixture(scope="module", autouse=True)
def activated():
    """The tests' own Transformers finds the reference kernel too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={backend.KERNEL_FOLDER}")
        yield


# The oracle: the plan, done by hand.

HAND = {
    "float": lambda model: model.to(torch.float32),
    "half": lambda model: model.to(torch.float16),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "lora": lambda model: peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4)),
    "dora": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True)
    ),
    "merge": lambda model: model.merge_and_unload(),
    "prepare_kbit": peft.prepare_model_for_kbit_training,
    "reload": lambda model: saved_and_loaded(model),
}


def saved_and_loaded(model):
    folder = checkpoints.scratch()
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="flash_attention_2"
    )


def by_hand(p):
    """What run() must report, from a script that a person would write."""
    path = checkpoints.get(p.checkpoint)
    dtypes = {"omitted": {}, "auto": {"dtype": "auto"}}
    arguments = dtypes.get(p.dtype) or ({} if p.dtype == "omitted" else {"dtype": p.dtype})
    default = torch.get_default_dtype()
    if p.default_dtype:
        torch.set_default_dtype(getattr(torch, p.default_dtype))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=p.attention, **arguments
        )
    finally:
        torch.set_default_dtype(default)
    found = {"loaded": counted(model), "changed": {}}
    for step in p.after_load:
        model = HAND[step](model)
        found["changed"] = counted(model)
    model.eval()

    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(p.question, return_tensors="pt")
    exact = AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation="sdpa")
    casting = contextlib.nullcontext()
    if p.autocast:
        casting = torch.autocast("cpu", dtype=getattr(torch, p.autocast))
    try:
        with torch.no_grad(), casting:
            logits = model(**inputs).logits.float()
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    except RuntimeError as error:
        return {**found, "error": str(error)}
    with torch.no_grad():
        gap = (logits - exact(**inputs).logits).abs().max()
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return {
        **found,
        "error": None,
        "finite": bool(torch.isfinite(logits).all()),
        "gap": float(gap),
        "text": text.removeprefix(p.question).strip(),
    }


def counted(model):
    return dict(Counter(str(w.dtype).split(".")[1] for w in model.parameters()))


@each_plan
def test_run_reports_what_plain_transformers_does(plan):
    expected, found = by_hand(plan), outcome(plan)
    assert found.plan == plan
    assert found.loaded_dtypes == expected["loaded"]
    assert found.changed_dtypes == expected["changed"]
    assert found.error == expected["error"]
    assert found.ok == (expected["error"] is None)
    if found.ok:
        assert found.stage == "done"
        assert found.finite == expected["finite"]
        assert found.text == expected["text"]
        assert found.max_logit_gap == pytest.approx(
            expected["gap"], rel=1e-3, abs=1e-5, nan_ok=True
        )
    else:
        assert found.stage == "forward"
        assert found.error_type == "RuntimeError"
        assert (found.finite, found.text, found.max_logit_gap) == (None, None, None)
    assert 0 < found.seconds < 60


@pytest.mark.parametrize(("plan", "weights", "gate"), TABLE, ids=[name_of(row[0]) for row in TABLE])
def test_table_of_the_guide(plan, weights, gate):
    found = outcome(plan)
    assert set(found.changed_dtypes or found.loaded_dtypes) == {weights}
    assert {record.kernel and record.kernel.q for record in found.gate} == {gate}
    assert all(record.kernel is None or len(set(record.kernel)) == 1 for record in found.gate)
    assert found.ok == (gate != "float32")
    assert found.error == (None if found.ok else REFUSED)
    assert len(found.gate) == (3 if found.ok else 1)
    assert found.backend == "reference"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("default", [None, "float16"])
def test_from_pretrained_is_called_as_the_plan_says(monkeypatch, dtype, default):
    """What 5.x does not tell apart, 4.x did."""
    calls = []
    real = AutoModelForCausalLM.from_pretrained

    def spy(path, **arguments):
        calls.append((arguments, torch.get_default_dtype()))
        return real(path, **arguments)

    run(plan())  # keeps the float32 reference, which is loaded through it too
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    run(plan(dtype=dtype, default_dtype=default))
    value = "auto" if dtype == "auto" else getattr(torch, dtype, None)
    arguments = {} if dtype == "omitted" else {"dtype": value}
    inside = torch.float16 if default else torch.float32
    assert calls == [({"attn_implementation": "flash_attention_2", **arguments}, inside)]
    assert torch.get_default_dtype() == torch.float32


def test_one_logit_that_is_not_finite_is_enough(monkeypatch):
    def spoil(model, _):
        model.lm_head.weight.data[700] = math.inf
        return model

    monkeypatch.setitem(STEPS, "spoil", Step(spoil, ()))
    found = run(plan(after_load=("spoil",)))
    assert found.ok
    assert found.finite is False


def test_overflow_in_float16_runs_and_is_wrong():
    broken, healthy = outcome(plan("overflow", "float16")), outcome(plan("overflow"))
    assert broken.ok
    assert broken.finite is False
    assert set(broken.text) == {"!"}
    assert math.isnan(broken.max_logit_gap)
    assert str(broken).startswith("runs, but its logits are not finite: !!!!!!")
    assert healthy.text == outcome(plan()).text
    assert len(set(healthy.text)) > 10


def test_error_is_raised_by_transformers_own_frames():
    frames = outcome(plan(dtype="float32")).frames
    inside = [frame.replace("\\", "/") for frame in frames]
    assert any("transformers/models/qwen2/modeling_qwen2.py" in frame for frame in inside)
    assert any("transformers/modeling_flash_attention_utils.py" in frame for frame in inside)
    assert "reference_kernel" in inside[-1]
    assert not any("experiment.py" in frame or "gate.py" in frame for frame in inside)
    assert not any(str(Path(transformers.__file__).parent) in frame for frame in frames)


@pytest.mark.parametrize(
    ("checkpoint", "tensors", "declared"),
    [
        ("bf16", "bfloat16", "bfloat16"),
        ("fp16", "float16", "float16"),
        ("undeclared", "bfloat16", None),
        ("mislabelled", "float32", "bfloat16"),
    ],
)
def test_what_the_files_say(checkpoint, tensors, declared):
    found = outcome(plan(checkpoint))
    assert list(found.file_dtypes) == [tensors]
    assert sum(found.file_dtypes.values()) == sum(found.loaded_dtypes.values())
    assert found.declared_dtype == declared


def test_old_key_of_config_json_is_read():
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    checkpoints.edit_config(folder, dtype=None, torch_dtype="float16")
    assert declared_dtype(folder) == "float16"


def test_versions_are_the_installed_ones():
    found = outcome(plan()).versions
    assert found["transformers"] == transformers.__version__
    assert found["torch"] == torch.__version__.split("+")[0]
    assert set(found) == {"python", "torch", "transformers", "kernels", "peft"}


@pytest.mark.parametrize(("limit", "threads"), [(None, 1), (0, 2)])
def test_only_a_small_model_runs_on_one_thread(monkeypatch, limit, threads):
    inside = []
    note = Step(lambda model, _: inside.append(torch.get_num_threads()) or model, ())
    monkeypatch.setitem(STEPS, "note", note)
    if limit is not None:
        monkeypatch.setattr(experiment, "SMALL", limit)
    torch.set_num_threads(2)
    try:
        assert run(plan(after_load=("note",))).ok
    finally:
        torch.set_num_threads(1)
    assert inside == [threads]


# What the libraries say.


def noisy(model, _=None):
    warnings.warn("mind the gap", UserWarning, stacklevel=1)
    warnings.warn("mind the gap", UserWarning, stacklevel=1)
    warnings.warn("old news", DeprecationWarning, stacklevel=1)
    for name in ("transformers.deep.inside", "kernels", "peft.tuners"):
        logging.getLogger(name).warning("said by %s", name)
    logging.getLogger("transformers").info("not worth teaching")
    return model


def test_everything_is_heard_also_the_second_time(monkeypatch, capfd):
    monkeypatch.setitem(STEPS, "noisy", Step(noisy, ("noisy(model)",)))
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.CRITICAL)
    plans = [plan(dtype="float32"), plan(dtype="float32", after_load=("noisy",))]
    first, second = [run(p) for p in plans], [run(p) for p in plans]
    assert capfd.readouterr() == ("", "")
    for quiet, loud in (first, second):
        assert [line for line in quiet.logs if line.startswith(NO_FLASH_ATTN)] != []
        assert quiet.logs[-1] == RESCUE.format("float32")
        said = tuple(f"said by {n}" for n in ("transformers.deep.inside", "kernels", "peft.tuners"))
        assert loud.logs == (*quiet.logs[:-1], *said, quiet.logs[-1])
        assert (quiet.warnings, loud.warnings) == ((), ("mind the gap",))
    assert outcome(plan("fp32", autocast="bfloat16")).logs[-1] == RESCUE.format("bfloat16")
    assert RESCUE.format("float32") not in outcome(plan()).logs


def test_run_leaves_the_line_for_the_users_own_run():
    """A message that Transformers says once is not used up by run(), nor by the user."""
    p = plan(dtype="float32")
    by_hand(p)
    assert RESCUE.format("float32") in run(p).logs
    heard = []

    class Listener(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    listener = Listener()
    logging.getLogger("transformers").addHandler(listener)
    try:
        by_hand(p)
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert RESCUE.format("float32") in heard


# The snippet.


def execute(code):
    """What the pasted lines print, with a path put in as the reader would."""
    path = repr(str(checkpoints.get("bf16")))
    printed = io.StringIO()
    default, here = torch.get_default_dtype(), Path.cwd()
    os.chdir(checkpoints.scratch())  # some lines save a model
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code.replace('"path/to/your-model"', path), "snippet", "exec"), {})
        return printed.getvalue().strip()
    finally:
        os.chdir(here)
        torch.set_default_dtype(default)


@each_plan
def test_snippet_does_what_the_run_did(plan):
    found = outcome(plan)
    code = found.snippet.replace(
        '"path/to/your-model"', repr(str(checkpoints.get(plan.checkpoint)))
    )
    if found.ok:
        assert execute(code).removeprefix(plan.question).strip() == found.text
    else:
        with pytest.raises(RuntimeError) as caught:
            execute(code)
        assert str(caught.value) == found.error


def test_snippet_trains_and_then_does_what_the_run_did():
    for dtype in ("auto", "float32"):
        found = run(plan("bf16", dtype, after_load=("lora", "train")))
        code = found.snippet
        if found.ok:
            assert execute(code).endswith(found.text)
        else:
            assert (found.stage, found.error) == ("generate", REFUSED)
            with pytest.raises(RuntimeError, match=REFUSED):
                execute(code)
    assert not found.ok


def test_snippet_of_a_folder_runs_as_it_is(tmp_path):
    folder = tmp_path / "it's a model"
    shutil.copytree(checkpoints.get("fp16"), folder)
    found = run(plan(folder, question='Which "dtypes" does\nit accept?'))
    assert execute(found.snippet).endswith(found.text)


PATHS = [*checkpoints.available(), "Qwen/Qwen1.5-0.5B", "C:\\my models\\'x'"]
plans = st.builds(
    LoadPlan,
    checkpoint=st.sampled_from(PATHS),
    dtype=st.sampled_from(["omitted", "auto", "bfloat16", "float16", "float32"]),
    default_dtype=st.sampled_from([None, "bfloat16", "float16", "float32"]),
    attention=st.sampled_from(["flash_attention_2", "sdpa", "eager"]),
    autocast=st.sampled_from([None, "bfloat16", "float16"]),
    after_load=st.lists(st.sampled_from(sorted(STEPS)), max_size=3).map(tuple),
    keyword=st.sampled_from(["dtype", "torch_dtype"]),
    adapter=st.sampled_from([None, "an/adapter"]),
    question=st.text(min_size=1),
)
releases = st.sampled_from(
    ["4.37.0", "4.55.4", "4.56.0.dev0", "4.56.0", "4.57.6", "5.0.0rc1", "5.22.2", "10.1"]
)


@settings(max_examples=200)
@given(plans, releases)
def test_snippet_says_the_plan_in_the_words_of_the_version(p, release):
    try:
        p.check()
    except PlanError:  # what cannot be merged or reloaded
        assume(False)
    tree = ast.parse(snippet(p, release))
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    load, *reloads = (
        node
        for node in sorted(filter(is_call, ast.walk(tree)), key=lambda node: node.lineno)
        if ast.unparse(node.func) == "AutoModelForCausalLM.from_pretrained"
    )
    keyword = "torch_dtype" if release in ("4.37.0", "4.55.4") else p.keyword
    expected = {"attn_implementation": repr(p.attention)}
    if p.dtype != "omitted":
        expected[keyword] = "'auto'" if p.dtype == "auto" else f"torch.{p.dtype}"
    for again in reloads:
        assert {k.arg: ast.unparse(k.value) for k in again.keywords} == {
            **{"attn_implementation": repr(p.attention), keyword: "'auto'"}
        }
    assert len(reloads) == p.after_load.count("reload")
    assert {k.arg: ast.unparse(k.value) for k in load.keywords} == expected
    path = next(n.value for n in tree.body if ast.unparse(n).startswith("path ="))
    own = p.checkpoint not in checkpoints.available()
    assert ast.literal_eval(path) == (p.checkpoint if own else "path/to/your-model")
    assert ast.literal_eval(calls["tokenizer"].args[0]) == p.question
    defaults = [ast.unparse(n.args[0]) for n in ast.walk(tree) if is_set_default(n)]
    assert defaults == ([f"torch.{p.default_dtype}", "before"] if p.default_dtype else [])
    assert ("torch.autocast" in calls) == bool(p.autocast)
    casting = [node for node in tree.body if isinstance(node, ast.With)]
    assert len(casting) == bool(p.autocast)
    inside = casting[0] if casting else tree
    assert "model.generate" in ast.unparse(inside)


def is_call(node):
    return isinstance(node, ast.Call)


def is_set_default(node):
    return is_call(node) and ast.unparse(node.func) == "torch.set_default_dtype"


# An adapter.


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """The folder of an adapter that has learned a lesson on ``bf16``, and the lesson."""
    path = checkpoints.get("bf16")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    model = peft.get_peft_model(model, training.lora_config())
    training.train(model, AutoTokenizer.from_pretrained(path))
    return training.save(model, tmp_path_factory.mktemp("adapter")), training.LESSON


@pytest.mark.parametrize("after_load", [(), ("merge",), ("merge", "reload")])
def test_a_plan_with_an_adapter_answers_what_it_learned(lesson, after_load):
    folder, (question, answer) = lesson
    p = plan(adapter=folder, after_load=after_load, question=question)
    found = run(p)
    assert (found.stage, found.text) == ("done", answer)
    assert set(found.loaded_dtypes) == {"bfloat16"}
    assert set(found.changed_dtypes) == {"bfloat16"} | (set() if after_load else {"float32"})
    # Measured from the base with its adapter: far closer than the base alone is.
    assert 0 < found.max_logit_gap < 1
    assert execute(found.snippet).endswith(answer)


def test_with_an_adapter_a_float32_base_fails_and_autocast_rescues_it(lesson):
    folder, (question, answer) = lesson
    p = plan(dtype="float32", adapter=folder, question=question)
    assert run(p).error == REFUSED
    assert run(replace(p, autocast="bfloat16")).text == answer


def test_an_adapter_that_does_not_fit_or_is_none_is_one_sentence(lesson, tmp_path):
    folder, _ = lesson
    assert "q_proj" in refused(plan("fp16", adapter=folder)) or "k_proj" in refused(
        plan("fp16", adapter=folder)
    )
    assert str(tmp_path) in refused(plan(adapter=tmp_path))


def test_an_adapter_in_the_place_of_a_checkpoint_names_its_base(lesson):
    folder, _ = lesson
    said = refused(plan(folder))
    assert f"its base, {str(checkpoints.get('bf16'))!r}, as checkpoint=" in said
    orphan = checkpoints.scratch(folder)
    settings = json.loads((orphan / "adapter_config.json").read_text("utf-8"))
    settings["base_model_name_or_path"] = "org/not-here"
    (orphan / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    assert "The base 'org/not-here' of the adapter" in refused(plan(orphan))


def refused(p):
    with pytest.raises(PlanError) as caught:
        run(p)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_architecture_that_the_kernel_route_does_not_reach_is_one_sentence(tmp_path):
    config = transformers.FalconConfig(
        **{"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    transformers.FalconForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    for file in checkpoints.get("bf16").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert "its attention up by the name 'flash_attention_2'" in refused(plan(tmp_path))
    assert run(plan(tmp_path, attention="sdpa")).ok


# JSON.


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize(
    "p",
    [plan(), plan("overflow", "float16"), plan(dtype="float32"), plan(Path("x"), torch.float16)],
    ids=name_of,
)
def test_json_holds_the_outcome(p):
    found = experiment.Outcome(p) if p.checkpoint == "x" else outcome(p)
    data = json.loads(found.to_json(), parse_constant=refuse_constant)
    assert data.pop("ok") == found.ok
    gap = data.pop("max_logit_gap")
    assert gap == ("nan" if p.checkpoint == "overflow" else found.max_logit_gap)
    again = LoadPlan(**data.pop("plan"))
    assert again == p
    gate = data.pop("gate")
    assert [row["layer"] for row in gate] == [record.layer for record in found.gate]
    for row, record in zip(gate, found.gate, strict=True):
        assert tuple(row["attention_input"]) == record.attention_input
        assert row["kernel"] == (record.kernel and list(record.kernel))
    seen = data.pop("xray")
    assert seen == (found.xray and json.loads(found.xray.to_json()))
    for name, value in data.items():
        expected = getattr(found, name)
        assert value == (list(expected) if isinstance(expected, tuple) else expected), name


@pytest.mark.parametrize("gap", [math.inf, -math.inf, math.nan, 0.0, None])
def test_json_of_any_gap(gap):
    found = replace(experiment.Outcome(plan()), max_logit_gap=gap)
    written = json.loads(found.to_json(), parse_constant=refuse_constant)["max_logit_gap"]
    if gap is None:
        assert written is None
    else:
        assert float(written) == pytest.approx(gap, nan_ok=True)


# Plans that are wrong.


def test_torch_dtypes_and_single_steps_may_stand_for_their_names():
    spelled = plan("bf16", torch.float16, default_dtype=torch.float32, autocast=torch.bfloat16)
    assert spelled == plan("bf16", "float16", default_dtype="float32", autocast="bfloat16")
    assert plan(after_load="lora") == plan(after_load=["lora"]) == plan(after_load=("lora",))
    assert plan(Path("a") / "b").checkpoint == os.path.join("a", "b")  # noqa: PTH118
    assert plan("~/model").checkpoint == str(Path.home()) + "/model"
    assert plan("org/model").checkpoint == "org/model"


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"dtype": "fp16"}, ["dtype='fp16'", "'float16'", "'omitted'"]),
        ({"dtype": torch.float64}, ["dtype='float64'", "'float32'"]),
        ({"dtype": None}, ["dtype=None", "'omitted'"]),
        ({"default_dtype": "auto"}, ["default_dtype='auto'", "None", "'bfloat16'"]),
        ({"attention": "flash"}, ["attention='flash'", "'flash_attention_2'", "'sdpa'"]),
        ({"autocast": "float32"}, ["autocast='float32'", "'float16'"]),
        ({"after_load": ("lora", "quantize")}, ["after_load has 'quantize'", "'merge'"]),
        ({"after_load": ("merge", "lora")}, ["'merge' with nothing to merge", "'lora' before"]),
        ({"checkpoint": "bf61"}, ["'bf61' is not a checkpoint", "'bf16'", "hub id"]),
        ({"checkpoint": ""}, ["'' is not a checkpoint", "'bf16'"]),
        ({"checkpoint": "/no/such/folder"}, ["'/no/such/folder'", "a folder"]),
        ({"question": ""}, ["makes no token of ''", "ask something"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_value_is_one_sentence_that_says_what_was_expected(wrong, names):
    assert_sentence(LoadPlan(**wrong), *names)


def assert_sentence(p, *parts):
    with pytest.raises(PlanError) as caught:
        run(p)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, text):
    return lambda folder: (folder / name).write_text(text, "utf-8")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 941184\n"


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (remove("config.json"), ["has no config.json", "save_pretrained"]),
        (write("config.json", "{bro"), ["config.json' is not a JSON object"]),
        (write("config.json", "[]"), ["config.json' is not a JSON object"]),
        (write("config.json", ""), ["config.json' is not a JSON object"]),
        (write("model.safetensors", POINTER), ["model.safetensors'", "git lfs pull"]),
        (remove("tokenizer.json", "tokenizer_config.json"), ["the tokenizer's files"]),
    ],
    ids=["no config", "torn", "list", "empty", "lfs", "no tokenizer"],
)
def test_folder_that_is_not_a_checkpoint_is_one_sentence(spoil, parts):
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    spoil(folder)
    assert_sentence(plan(folder), repr(str(folder))[1:-1], *parts)
    if "tokenizer" not in parts[0]:  # before anything is loaded
        with pytest.raises(PlanError):
            resolve(str(folder))


def test_torn_weights_are_one_sentence():
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert_sentence(plan(folder), "is not a complete safetensors file")


def test_weights_in_another_format_load():
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = run(plan(folder))
    assert found.ok, found
    assert found.file_dtypes == {}


def test_hub_id_without_network_is_quickly_one_sentence(monkeypatch):
    """The network answers as without a cable; HF_HUB_OFFLINE=1 is in test_backend."""

    def unreachable(*_args, **_kwargs):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    assert_sentence(plan("org/nothing"), "'org/nothing'", "needs network", "'bf16'")


def test_hub_id_that_the_hub_does_not_know(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repo, file: False)
    assert_sentence(plan("org/nothing"), "'org/nothing'", "the hub shows no such model")


def test_typing_error_in_a_relative_folder_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("./model", "../model", "."):
        assert_sentence(plan(path), repr(path))


def test_errors_inside_are_outcomes():
    """A plan that can be tried is tried, whatever comes of it."""
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    checkpoints.edit_config(folder, model_type="nonsense")
    found = run(plan(folder))
    assert (found.stage, found.error_type, found.ok) == ("load", "ValueError", False)
    assert "nonsense" in found.error


def test_reference_is_made_anew_when_the_files_change():
    """With sdpa in float32 the run and its reference are the same computation: no distance."""
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    assert run(plan(folder, attention="sdpa")).max_logit_gap > 0.01
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    model.save_pretrained(folder)
    after = run(plan(folder, attention="sdpa"))
    assert after.max_logit_gap == 0
    assert after.file_dtypes.keys() == {"float32"}

    checkpoints.edit_config(folder, rms_norm_eps=0.5)
    assert run(plan(folder, attention="sdpa")).max_logit_gap == 0

    (folder / "model.safetensors").unlink()
    for factor in (1, 2):
        with torch.no_grad():
            model.model.norm.weight.mul_(factor)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        assert run(plan(folder, attention="sdpa")).max_logit_gap == 0


def test_all_knobs_of_the_panel_make_a_plan():
    known = DTYPES, DEFAULT_DTYPES, ATTENTION, AUTOCAST
    for dtype, default, attention, autocast in itertools.product(*known):
        plan("bf16", dtype, default_dtype=default, attention=attention, autocast=autocast).check()


@pytest.mark.parametrize(
    ("options", "error", "gate"),
    [
        ({"dtype": "float32"}, "FlashAttention only support fp16 and bf16 data type", "float32"),
        ({"dtype": "auto"}, None, "bfloat16"),
        ({"dtype": "float32", "autocast": "float16"}, None, "float16"),
        ({"after_load": ("prepare_kbit",)}, "FlashAttention only support", "float32"),
        ({"after_load": ("norms_float",)}, "mat1 and mat2 must have the same dtype", None),
        ({"dtype": "float32", "attention": "sdpa"}, None, None),
    ],
)
def test_a_model_whose_weights_are_absent_runs_without_them(options, error, gate):
    """What the small model does with weights, and the full one without."""
    found = run(plan("Qwen1.5-7B", **options))
    small = run(plan("bf16", **options))
    assert found.weightless
    assert (found.ok, found.error_type, found.error) == (small.ok, small.error_type, small.error)
    assert (error is None) is found.ok
    assert error is None or error in found.error
    assert {record.kernel and record.kernel.q for record in found.gate} == (
        {gate} if gate else ({None} if found.gate else set())
    )
    assert (found.text, found.finite, found.max_logit_gap) == (None, None, None)
    assert json.loads(found.to_json())["plan"]["checkpoint"] == "Qwen1.5-7B"
    assert len(found.gate) == (32 if found.ok else len(small.gate))


def test_without_weights_the_traceback_is_the_one_with_weights():
    full = run(plan("Qwen1.5-72B", dtype="float32"))
    small = run(plan("bf16", dtype="float32"))
    assert full.frames == small.frames
    mixed = run(plan("Qwen1.5-72B", after_load=("norms_float",)))
    assert mixed.frames == run(plan("bf16", after_load=("norms_float",))).frames


def test_a_folder_or_a_config_without_weights_runs_without_them():
    folder = checkpoints.scratch(checkpoints.get("fp32"))
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(folder)
    for what in (folder, config):
        found = run(plan(what))
        assert found.weightless
        assert found.error == "FlashAttention only support fp16 and bf16 data type"
        assert found.loaded_dtypes == {"float32": 38}
        assert "no weights here" in view.road_text(found)
    assert run(plan(folder, dtype="bfloat16")).ok


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"after_load": ("lora", "merge")}, ["'merge'", "weights"]),
        ({"after_load": ("train",)}, ["'train'", "weights"]),
    ],
)
def test_what_needs_weights_is_one_sentence(options, parts):
    assert_sentence(plan("Qwen2-7B", **options), "'Qwen2-7B'", *parts)
