"""The command dtype-doctor: what it prints, and its exit status."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from helpers import backend, cli, experiment, machine
from helpers.doctor.command import main
from helpers.experiment import Outcome
from helpers.plan import LoadPlan
from helpers.steps import STEPS

ROOT = Path(__file__).resolve().parent.parent
REFUSED = "FlashAttention only support fp16 and bf16 data type"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return cli.main(["run", *arguments])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--dtype", "auto"), 0, "✔ Works"),
        (("--checkpoint", "fp32"), 1, f"✖ Fails: RuntimeError: {REFUSED}"),
        (("--checkpoint", "overflow", "--dtype", "float16"), 1, "⚠ Runs, and is wrong"),
        (("--checkpoint", "fp32", "--after-load", "lora", "merge", "half"), 0, "after lora, merge"),
    ],
)
def test_the_status_is_the_verdict(capsys, arguments, status, said):
    assert run(*arguments) == status
    printed = capsys.readouterr()
    assert said in printed.out
    assert "transformers 5" in printed.out
    assert printed.err == ""


def test_every_field_of_a_plan_can_be_said(monkeypatch, capsys):
    plans = []
    monkeypatch.setattr(experiment, "run", lambda plan: plans.append(plan) or Outcome(plan))
    run(
        *("--checkpoint", "fp16", "--dtype", "float32", "--default-dtype", "float16"),
        *("--attention", "eager", "--autocast", "bfloat16", "--adapter", "an/adapter"),
        *("--after-load", "merge", "reload", "--question", "And why?", "--keyword", "torch_dtype"),
        "--json",
    )
    assert plans == [
        LoadPlan(
            "fp16",
            "float32",
            "float16",
            "eager",
            "bfloat16",
            ("merge", "reload"),
            "And why?",
            "an/adapter",
            "torch_dtype",
        )
    ]
    assert LoadPlan(**json.loads(capsys.readouterr().out)["plan"]) == plans[0]


def xray(*arguments):
    return cli.main(["xray", *arguments])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("Qwen2-0.5B",), 0, "✔ passes: FlashAttention got bfloat16 in 24 attention calls"),
        (("Qwen1.5-72B", "--dtype", "float32"), 1, f"✖ fails: RuntimeError: {REFUSED}"),
        (("bf16", "--norms", "float32"), 1, "got Float and BFloat16"),
        (("bf16", "--dtype", "float32", "--autocast", "float16"), 0, "after the rescue cast"),
        (("bf16", "--lora", "--decode"), 0, "PeftModelForCausalLM, bfloat16, lora"),
    ],
)
def test_the_status_of_an_xray_is_its_verdict(capsys, arguments, status, said):
    assert xray(*arguments) == status
    printed = capsys.readouterr()
    assert said in printed.out
    assert printed.err == ""
    assert max(map(len, printed.out.splitlines())) <= 100


def test_an_xray_that_could_not_be_told_is_2(capsys, tmp_path):
    assert xray(str(tmp_path)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "has no config.json" in printed.err
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert xray(str(tmp_path)) == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_an_xray_as_json(capsys):
    assert xray("bf16", "--norms", "float32", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["first_float32"]["name"] == "model.layers.0.input_layernorm.weight"
    assert found["river"]


def test_json_is_the_outcome(capsys):
    assert run("--checkpoint", "fp32", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["error_type"], found["error"]) == ("RuntimeError", REFUSED)
    assert found["versions"] == backend.versions()


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_a_run_leaves_the_environment_as_it_was(attention):
    before = dict(os.environ)
    assert run("--dtype", "auto", "--attention", attention) == 0
    assert dict(os.environ) == before


def test_a_console_without_the_signs_shows_question_marks():
    done = subprocess.run(
        [sys.executable, "-m", "helpers.cli", "run", "--dtype", "auto"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        encoding="cp1252",
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "? Works" in done.stdout


def test_a_stdout_that_is_no_text_file_will_do(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook
    assert run("--dtype", "auto") == 0
    assert "✔ Works" in sys.stdout.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--checkpoint", "nowhere"), "'nowhere' is not a checkpoint"),
        (("--after-load", "merge"), "--after-load has 'merge' with nothing to merge"),
        (("--adapter", "nowhere"), "nowhere"),
    ],
)
def test_a_plan_that_cannot_run_is_one_sentence_and_status_2(capsys, arguments, said):
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [(), ("run", "--dtype", "bf16"), ("run", "--after-load", "x")]
)
def test_what_the_command_line_does_not_know_is_refused(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    assert "usage: dtype-doctor" in capsys.readouterr().err


@pytest.mark.parametrize("ready", [True, False])
def test_env_is_the_report_on_the_machine(monkeypatch, ready):
    monkeypatch.setattr(machine, "report", lambda: ready)
    assert cli.main(["env"]) == (0 if ready else 1)


def test_it_is_installed_as_dtype_doctor():
    (command,) = entry_points(group="console_scripts", name="dtype-doctor")
    assert command.load() is main


def test_the_help_explains_every_option_every_step_and_the_status(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    said = capsys.readouterr().out
    options = said[said.index("options:") : said.index("steps of --after-load:")]
    described = re.findall(r"^  (--[a-z-]+)[^\n]*\n?\s+[a-z]", options, re.M)
    assert {f"--{field.name.replace('_', '-')}" for field in fields(LoadPlan)} <= set(described)
    assert [name for name in STEPS if f"\n  {name} " not in said] == []
    assert "exit status: 0" in said
