"""The doctor where it is carried to: in one file, on any Python, and beside torch and transformers
alone."""

import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_matrix import V4, ready

ROOT = Path(__file__).resolve().parents[1]
MESSAGE = "FlashAttention only support fp16 and bf16 data type"
TEXT = f"We will cast back the input in torch.float32.\nRuntimeError: {MESSAGE}\n"


def pythons():
    """Each Python that is here, by its version: this one, those on the path, and pyenv's."""
    names = ["python2", *(f"python3.{minor}" for minor in range(6, 16))]
    found = [shutil.which(name) for name in names]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found += sorted(map(str, pyenv.glob("*/bin/python")))
    here = {"{}.{}".format(*sys.version_info): sys.executable}
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, found):
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:  # pyenv's shims are there for Pythons that are not
            here.setdefault(done.stdout.strip(), path)
    return here


PYTHONS = pythons()
NEW = {v: path for v, path in PYTHONS.items() if tuple(map(int, v.split("."))) >= (3, 9)}


@pytest.fixture(scope="module")
def pyz(tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "dtype-doctor.pyz"
    subprocess.run([sys.executable, ROOT / "tools" / "pyz.py", file], check=True)
    return file


def test_the_same_sources_make_the_same_bytes(pyz, tmp_path):
    again = tmp_path / "again.pyz"
    runpy.run_path(str(ROOT / "tools" / "pyz.py"))["main"](again)
    assert again.read_bytes() == pyz.read_bytes()
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.name == "nt" or pyz.stat().st_mode & stat.S_IXUSR
    with zipfile.ZipFile(pyz) as archive:
        assert archive.namelist() == sorted(archive.namelist())
        assert {one.date_time for one in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        here = [str(folder).encode() for folder in (ROOT, Path.home()) if len(folder.parts) > 1]
        for name in archive.namelist():
            assert not [path for path in here if path in archive.read(name)], name


def test_all_of_the_doctor_is_in_it_and_git_ignores_nothing_of_that(pyz):
    """What git ignores, a wheel of the clone leaves out too."""
    with zipfile.ZipFile(pyz) as archive:
        packed = set(archive.namelist())
    doctor = ROOT / "helpers" / "doctor"
    kinds = (".py", ".json", ".mo")
    files = [
        path.relative_to(ROOT).as_posix() for path in doctor.rglob("*") if path.suffix in kinds
    ]
    assert {*files} <= packed
    assert "helpers/doctor/causes/head-dim.json" in packed
    assert "helpers/doctor/locale/zh_CN/LC_MESSAGES/doctor.mo" in packed
    if shutil.which("git") and (ROOT / ".git").exists():
        asked = "\n".join(packed - {"__main__.py"})
        command = ["git", "check-ignore", "--stdin"]
        done = subprocess.run(command, input=asked, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == ""


@pytest.fixture(params=sorted(NEW, key=lambda v: int(v.split(".")[1])))
def command(request, pyz, tmp_path):
    """Run the archive with one of the Pythons, which finds nothing but its standard library."""

    def run(*arguments, given=""):
        return subprocess.run(
            [NEW[request.param], "-I", "-S", "-W", "error", pyz, *arguments],
            input=given,
            capture_output=True,
            encoding="utf-8",
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8"},
        )

    return run


def test_one_file_does_what_the_command_does(command, tmp_path):
    from helpers.doctor import catalogue, words
    from helpers.doctor.text import diagnose_text

    file = tmp_path / "log.txt"
    file.write_text(TEXT, "utf-8")
    with_file, dash, bare = command(file), command("-", given=TEXT), command(given=TEXT)
    assert with_file.stdout == dash.stdout == bare.stdout
    assert "weights-fp32" in bare.stdout
    told = command("--json", given=TEXT)
    words.choose("en")
    assert json.loads(told.stdout) == json.loads(diagnose_text(TEXT).to_json())
    report = command("--report", file)
    assert MESSAGE in report.stdout
    explained = command("explain", "head-dim")
    assert explained.stdout == catalogue.page("head-dim") + "\n"
    chinese = command("--lang", "zh-CN", given=TEXT)
    assert re.search("[\u4e00-\u9fff]", chinese.stdout)
    done = (with_file, dash, bare, told, report, explained, chinese)
    assert [one.returncode for one in done] == [1, 1, 1, 1, 1, 0, 1]
    assert [one.stderr for one in done] == [""] * 7


@pytest.mark.parametrize("name", ["run", "xray", "env"])
def test_what_needs_the_guide_says_so_in_one_sentence(command, name):
    done = command(name)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(f"'dtype-doctor {name}' needs the whole guide, .*\n", done.stderr)


def test_a_python_that_is_too_old_is_told_so(pyz):
    too_old = sorted(set(PYTHONS) - set(NEW))
    for version in too_old:
        done = subprocess.run([PYTHONS[version], pyz], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(
            f"dtype-doctor needs Python 3.9 or newer, and this is {version}"
        )
        assert done.stderr.count("\n") == 1
    with zipfile.ZipFile(pyz) as archive:
        main = archive.read("__main__.py").decode("ascii")
    before = {**vars(sys), "version_info": (3, 8, 1)}
    old_sys = type(sys)("sys")
    vars(old_sys).update(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sys", old_sys)
        with pytest.raises(SystemExit, match=r"this is 3\.8: try python3"):
            exec(main, {})


# Beside torch and transformers alone

ALONE = '''
"""In this process nothing can be imported but torch, transformers and what they require."""
import importlib.metadata as metadata
import importlib.util
import json
import re
import sys
from importlib.machinery import PathFinder

from packaging.requirements import Requirement

source = sys.argv[1]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


allowed, waiting = set(), ["torch", "transformers"]
while waiting:
    name = canonical(waiting.pop())
    if name in allowed:
        continue
    try:
        needs = [Requirement(line) for line in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        continue
    allowed.add(name)
    waiting += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
barred = {
    top
    for top, owners in metadata.packages_distributions().items()
    if not allowed & set(map(canonical, owners))
}


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in barred:
            return PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context=metadata.DistributionFinder.Context()):
        return (
            one
            for one in PathFinder.find_distributions(context)
            if canonical(one.metadata["Name"]) in allowed
        )


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.path.insert(0, source)
'''
CODE = (
    ALONE
    + """
for name in ("kernels", "peft", "accelerate", "platformdirs", "ipywidgets", "helpers"):
    assert (importlib.util.find_spec(name) is None) == (name != "helpers"), name
import os

import helpers
from helpers import backend


def sentence(do):
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


before = dict(os.environ)
activated = sentence(backend.activate)
unchanged = before == dict(os.environ)

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config

from helpers import diagnose, why
from helpers.reference_kernel.attention import flash_attn_func


def attention(module, query, key, value, mask, **_):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(q, k, v, causal=True), None


AttentionInterface.register("by_hand", attention)
config = Qwen2Config(
    num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=100, layer_types=["full_attention"] * 2,
)


def model(dtype):
    torch.set_default_dtype(dtype)
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation="by_hand").eval()
    finally:
        torch.set_default_dtype(torch.float32)


def told(found):
    return [found.cause, found.certain, found.is_failure]


ids = torch.ones(2, 8, dtype=torch.long)
try:
    model(torch.float32)(input_ids=ids)
except RuntimeError as error:
    raised, asked = str(error), why(error)
answer = {
    "home": helpers.__file__,
    "text": told(diagnose(f"We will cast back the input in torch.float32.\\n{raised}")),
    "raised": raised,
    "why": told(asked),
    "shown": [f"{one.what} {one.text} {one.means}" for one in asked.evidence],
    "float32": told(diagnose(model(torch.float32))),
    "bfloat16": told(diagnose(model(torch.bfloat16))),
    "xray": repr(helpers.xray(model(torch.float32)).first_float32),
    "run": sentence(lambda: helpers.run(helpers.LoadPlan())),
    "explore": sentence(lambda: helpers.explore()),
    "by name": sentence(lambda: helpers.xray("Qwen1.5-72B")),
    "activated": activated,
    "unchanged": unchanged,
    "barred": sorted(barred & {name.partition(".")[0] for name in sys.modules}),
}
print(json.dumps(answer))
"""
)


@pytest.fixture(scope="module", params=["clone", "pyz"])
def source(request):
    return ROOT if request.param == "clone" else request.getfixturevalue("pyz")


@pytest.fixture(scope="module", params=["5", "4"])
def answers(request, source, tmp_path_factory):
    """What the doctor said in a process of either generation of Transformers."""
    python = sys.executable
    if request.param == "4":
        if not ready(V4, "--v4"):
            if os.environ.get("CI"):
                pytest.fail(".venv-v4 is not ready: make setup-v4")
            pytest.skip(".venv-v4 is not ready, so nothing ran under Transformers 4: make setup-v4")
        python = str(V4)
    folder = tmp_path_factory.mktemp("alone")
    (folder / "script.py").write_text(CODE, "utf-8")
    unset = ("LOCAL_KERNELS", "KERNELS_CACHE", "HF_HUB_OFFLINE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [python, folder / "script.py", source],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["home"].startswith(str(source))
    assert found["raised"] == MESSAGE
    assert found["barred"] == []
    return found


def test_why_and_the_text_need_torch_and_transformers_only(answers):
    assert answers["text"] == ["weights-fp32", True, True]
    assert answers["why"] == ["weights-fp32", True, True]
    assert [line for line in answers["shown"] if "float32" in line]


def test_a_model_needs_torch_and_transformers_only(answers):
    assert answers["float32"] == ["weights-fp32", True, True]
    assert answers["bfloat16"] == [None, True, False]
    assert "model.embed_tokens.weight" in answers["xray"]


def test_what_needs_more_says_so_in_one_sentence(answers):
    for name in ("run", "explore"):
        needs = rf"(ImportError: helpers\.{name} needs more than is here, .* is missing: take .*"
        assert re.fullmatch(rf"{needs}|RuntimeError: No FlashAttention runs on .*)", answers[name])
    refused = answers["by name"]
    assert refused.startswith("RuntimeError: No FlashAttention runs on this machine, and the")
    assert answers["activated"] == refused
    assert answers["unchanged"]
