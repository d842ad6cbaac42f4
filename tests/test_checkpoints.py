"""The six checkpoints: what is in them, that they are one function, and how they come to be."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from helpers import checkpoints
from helpers.errors import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["bf16", "fp16", "fp32", "undeclared", "mislabelled", "overflow"]
#             the tensors' dtype, config.json's dtype
STATED = {
    "bf16": (torch.bfloat16, "bfloat16"),
    "fp16": (torch.float16, "float16"),
    "fp32": (torch.float32, "float32"),
    "undeclared": (torch.bfloat16, None),
    "mislabelled": (torch.float32, "bfloat16"),
    "overflow": (torch.bfloat16, "bfloat16"),
}
each = pytest.mark.parametrize("name", NAMES)
posix_only = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX file system")

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name, dtype, attention="sdpa"):
    folder = checkpoints.get(name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


# What is in them.


def test_there_are_six():
    assert checkpoints.available() == NAMES


@each
def test_tensors_and_config_have_the_stated_dtypes(name):
    tensors = load_file(checkpoints.get(name) / "model.safetensors")
    config = json.loads((checkpoints.get(name) / "config.json").read_text("utf-8"))
    dtype, declared = STATED[name]
    assert Counter(t.dtype for t in tensors.values()) == {dtype: len(tensors)}
    assert config.get("dtype") == declared
    assert "torch_dtype" not in config


@each
def test_shape_is_qwen15s(name):
    model = load(name, "auto")
    assert type(model) is Qwen2ForCausalLM
    attention = model.model.layers[0].self_attn
    assert [getattr(attention, p).bias is not None for p in ("q_proj", "k_proj", "v_proj")] == [
        True
    ] * 3
    assert attention.o_proj.bias is None
    tensors = load_file(checkpoints.get(name) / "model.safetensors")
    assert any(key.endswith("self_attn.v_proj.bias") for key in tensors)
    assert not any(key.endswith("o_proj.bias") for key in tensors)


def test_one_of_them_uses_grouped_query_attention():
    grouped = []
    for name in NAMES:
        config = json.loads((checkpoints.get(name) / "config.json").read_text("utf-8"))
        rows = load_file(checkpoints.get(name) / "model.safetensors")
        k = rows["model.layers.0.self_attn.k_proj.weight"].shape[0]
        q = rows["model.layers.0.self_attn.q_proj.weight"].shape[0]
        assert q // k == config["num_attention_heads"] // config["num_key_value_heads"]
        grouped += [name] * (k < q)
    assert grouped == ["fp16"]


@each
def test_token_0_is_an_exclamation_mark_and_text_survives_the_tokenizer(name):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.get(name))
    assert tokenizer.decode([0]) == "!"
    assert tokenizer("!!!")["input_ids"] != []
    assert tokenizer.decode(tokenizer(checkpoints.QUESTION)["input_ids"]) == checkpoints.QUESTION
    assert tokenizer.eos_token_id == load(name, "auto").generation_config.eos_token_id


# One function.


@pytest.fixture(scope="module")
def prompts():
    """(4, 24) token ids: the question of the guide, padded by repetition, and random ones."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.TALKER)
    question = tokenizer(checkpoints.QUESTION)["input_ids"]
    rows = torch.randint(len(tokenizer), (4, 24), generator=torch.Generator().manual_seed(1))
    rows[0] = torch.tensor((question * 24)[:24])
    return rows


@pytest.fixture(scope="module")
def exact(prompts):
    """The shipped model's logits in float64."""
    model = Qwen2ForCausalLM.from_pretrained(checkpoints.TALKER, dtype=torch.float64)
    with torch.inference_mode():
        return model(prompts).logits


@each
def test_float32_logits_are_the_shipped_models(name, prompts, exact):
    with torch.inference_mode():
        logits = load(name, torch.float32)(prompts).logits
    assert logits.dtype == torch.float32
    # A hundred roundings of the largest logit; a half-precision run is thousands away.
    bound = 100 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((logits - exact).abs().max()) < bound
    with torch.inference_mode():
        half = load(name, torch.bfloat16)(prompts).logits.double()
    assert float((half - exact).abs().max()) > 10 * bound


@each
def test_it_answers_the_guides_question(name):
    talker = tomllib.loads((ROOT / "tools" / "talker.toml").read_text("utf-8"))
    answer = {pair["prompt"]: pair["answer"] for pair in talker["pair"]}[checkpoints.QUESTION]
    tokenizer = AutoTokenizer.from_pretrained(checkpoints.get(name))
    inputs = tokenizer(checkpoints.QUESTION, return_tensors="pt")
    output = load(name, "auto").generate(**inputs, max_new_tokens=32, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.removeprefix(checkpoints.QUESTION).strip() == answer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_overflow_is_only_wrong_in_float16(attention, prompts):
    model = load("overflow", torch.float16, attention)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    with torch.inference_mode():
        assert not bool(model(prompts).logits.isfinite().all())
        assert bool(load("overflow", torch.bfloat16, attention)(prompts).logits.isfinite().all())
        assert bool(load("bf16", torch.float16, attention)(prompts).logits.isfinite().all())


# How they come to be.


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoints.CACHE, str(tmp_path / "cache"))
    checkpoints._temporary.cache_clear()
    yield tmp_path / "cache"
    checkpoints._temporary.cache_clear()


@pytest.fixture
def no_temporary_folder(tmp_path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    return nowhere


def assert_usable(folder):
    """It loads and its tokenizer works: the files are whole."""
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    model = Qwen2ForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("!", return_tensors="pt")
    assert bool(model(**ids).logits.isfinite().all())


def below(folder):
    """Every path below a folder, as text."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match=r"no checkpoint 'bf61': choose one of bf16, fp16, fp32"):
        checkpoints.get("bf61")


def test_second_time_returns_the_same_files(empty_cache):
    first = checkpoints.get("bf16")
    assert_usable(first)
    assert first.is_absolute()
    assert first.is_relative_to(empty_cache)
    times = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert checkpoints.get("bf16") == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == times
    assert [path for path in below(empty_cache) if Path(path).name.startswith(".")] == []


def test_making_one_changes_nothing_else_in_the_process(empty_cache, capfd):
    seed = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float16)
    try:
        tensors = load_file(checkpoints.get("fp32") / "model.safetensors")
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert capfd.readouterr() == ("", "")


def test_a_relative_cache_folder_survives_a_change_of_folder(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoints.CACHE, "here")
    monkeypatch.chdir(tmp_path)
    folder = checkpoints.get("bf16")
    monkeypatch.chdir(ROOT)
    assert_usable(folder)
    assert folder.is_relative_to(tmp_path / "here")


def test_the_users_cache_folder_is_the_default(empty_cache, monkeypatch):
    import platformdirs

    monkeypatch.setenv(checkpoints.CACHE, "")
    assert checkpoints.cache() == Path(platformdirs.user_cache_dir("flashattention-dtype-guide"))


@pytest.mark.parametrize("file", checkpoints.FILES)
def test_checkpoint_with_a_deleted_file_is_made_again(empty_cache, file):
    folder = checkpoints.get("fp16")
    (folder / file).unlink()
    assert checkpoints.get("fp16") == folder
    assert_usable(folder)
    assert below(folder.parent) == ["fp16", *sorted(f"fp16/{name}" for name in checkpoints.FILES)]


def test_a_new_talker_makes_new_checkpoints(empty_cache, tmp_path, monkeypatch):
    old = checkpoints.get("fp16")
    new = tmp_path / "talker"
    shutil.copytree(checkpoints.TALKER, new)
    checkpoints.edit_config(new, comment="another model")
    monkeypatch.setattr(checkpoints, "TALKER", new)
    checkpoints._digest.cache_clear()
    try:
        assert checkpoints.get("fp16") != old
    finally:
        checkpoints._digest.cache_clear()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError("disk on fire")])
def test_interrupted_build_leaves_nothing(empty_cache, monkeypatch, error):
    """The last file is being written when it happens."""
    real = checkpoints.edit_config

    def broken(folder, **changes):
        assert (folder / "model.safetensors").is_file()
        if folder.is_relative_to(empty_cache):
            raise error
        real(folder, **changes)

    monkeypatch.setattr(checkpoints, "edit_config", broken)
    if isinstance(error, OSError):
        assert_usable(checkpoints.get("fp16"))
    else:
        with pytest.raises(error):
            checkpoints.get("fp16")
    assert [path for path in below(empty_cache) if "fp16" in path] == []

    monkeypatch.undo()
    monkeypatch.setenv(checkpoints.CACHE, str(empty_cache))
    assert_usable(checkpoints.get("fp16"))


def test_another_process_that_was_first_is_not_disturbed(empty_cache, monkeypatch):
    made = checkpoints.get("fp16")
    stranger = made.parent / "stranger"
    made.rename(stranger)
    real = checkpoints._save

    def overtaken(recipe, folder):
        real(recipe, folder)
        if not made.exists():
            shutil.copytree(stranger, made)
            (made / "theirs").touch()

    monkeypatch.setattr(checkpoints, "_save", overtaken)
    assert checkpoints.get("fp16") == made
    assert (made / "theirs").exists()
    shutil.rmtree(stranger)
    assert {path.split("/")[0] for path in below(made.parent)} == {"fp16"}


AT_ONCE = """
import json, multiprocessing, sys
from transformers import Qwen2ForCausalLM  # imported before the start
from helpers import checkpoints

def work(start, answers):
    start.wait(60)
    try:
        answers.put([str(checkpoints.get(name)) for name in ("bf16", "fp16")])
    except BaseException as error:
        answers.put(repr(error))

if __name__ == "__main__":
    # Forked, they share one import of the libraries; only Linux forks them safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    start, answers = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=work, args=(start, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    print(json.dumps([answers.get() for _ in processes]))
"""


def test_several_processes_at_once(empty_cache, fresh_python):
    answers = fresh_python(AT_ONCE)
    assert len(answers) == 4
    # Nobody failed, and nobody had to go to a temporary folder.
    assert {tuple(answer) for answer in answers} == {tuple(answers[0])}, answers
    folders = [Path(folder) for folder in answers[0]]
    for folder in folders:
        assert folder.is_relative_to(empty_cache)
        assert_usable(folder)
    assert {path.split("/")[0] for path in below(folders[0].parent)} == {"bf16", "fp16"}


def mount(folder, options):
    """A small file system, or a skip that says why there is none."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs Linux and root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(empty_cache):
    """Mounts the cache with some mount options."""
    mounted = []

    def make(options):
        mount(empty_cache, options)
        mounted.append(empty_cache)

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


MODEL = (checkpoints.TALKER / "model.safetensors").stat().st_size // 1024


@pytest.mark.parametrize("kilobytes", [64, MODEL + 20], ids=["nothing fits", "tokenizer does not"])
def test_full_disk_falls_back_to_a_temporary_folder(
    empty_cache, small_disk, kilobytes, monkeypatch, tmp_path
):
    small_disk(f"size={kilobytes}k")
    folder = checkpoints.get("fp16")
    assert_usable(folder)
    assert not folder.is_relative_to(empty_cache)
    assert folder == checkpoints.get("fp16")
    assert [path for path in below(empty_cache) if "fp16" in path] == []
    assert_usable(checkpoints.scratch(folder))


def make_read_only(empty_cache, small_disk):
    small_disk("ro,size=64k")


def make_forbidden(empty_cache, _):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("root and Windows may write into every folder")
    empty_cache.mkdir(mode=0o500)


def make_a_file(empty_cache, _):
    empty_cache.write_text("a file")


@pytest.mark.parametrize("spoil", [make_read_only, make_forbidden, make_a_file])
def test_cache_that_cannot_be_written(
    empty_cache, small_disk, spoil, tmp_path, monkeypatch, request
):
    spoil(empty_cache, small_disk)
    folder = checkpoints.get("fp16")
    assert_usable(folder)
    assert not folder.is_relative_to(empty_cache)
    copy = checkpoints.scratch(folder)
    assert_usable(copy)
    assert not copy.is_relative_to(empty_cache)

    checkpoints._temporary.cache_clear()
    request.getfixturevalue("no_temporary_folder")
    for make in (lambda: checkpoints.get("bf16"), checkpoints.scratch):
        with pytest.raises(CheckpointError) as caught:
            make()
        sentence = str(caught.value)
        assert str(empty_cache) in sentence
        assert re.search(r"set DTYPE_GUIDE_CACHE to a writable folder\.$", sentence)
        assert "\n" not in sentence


# Copies that a person changes.


def test_scratch_is_a_new_folder_that_can_be_changed(empty_cache):
    assert list(checkpoints.scratch().iterdir()) == []
    original = checkpoints.get("bf16")
    copy, other = checkpoints.scratch(original), checkpoints.scratch(original)
    assert len({original, copy, other}) == 3
    for file in checkpoints.FILES:
        assert (copy / file).read_bytes() == (original / file).read_bytes()
    checkpoints.edit_config(copy, dtype="float32")
    assert (original / "config.json").read_bytes() == (other / "config.json").read_bytes()


def test_edit_config_sets_and_removes_keys_and_keeps_the_rest():
    folder = checkpoints.scratch(checkpoints.get("bf16"))
    file = folder / "config.json"
    before = json.loads(file.read_text("utf-8"))
    assert before["sliding_window"] is None
    checkpoints.edit_config(folder, dtype=None, _attn_implementation="flash_attention_2")
    after = json.loads(file.read_text("utf-8"))
    assert "dtype" not in after
    assert after.pop("_attn_implementation") == "flash_attention_2"
    assert after == {key: value for key, value in before.items() if key != "dtype"}


SCRATCH = """
import json
from helpers import checkpoints
print(json.dumps(str(checkpoints.scratch())))
"""


def test_scratch_goes_when_the_process_ends(own_cache, fresh_python):
    folder = Path(fresh_python(SCRATCH))
    assert folder.is_relative_to(own_cache)
    assert not folder.exists()


def test_making_a_checkpoint_leaves_what_transformers_has_said_once(monkeypatch, tmp_path, caplog):
    from transformers.utils import logging as transformers_logging

    monkeypatch.setenv(checkpoints.CACHE, str(tmp_path))
    logger = transformers_logging.get_logger("transformers.models.some")
    logger.warning_once("said once")
    checkpoints.get("fp16")
    logger.warning_once("said once")
    assert [record.message for record in caplog.records].count("said once") == 1


def test_what_a_killed_process_left_goes_a_day_later(monkeypatch, tmp_path):
    monkeypatch.setenv(checkpoints.CACHE, str(tmp_path))
    left = [tmp_path / "scratch-old", tmp_path / "0123456789ab" / ".bf16-xyz"]
    kept = [tmp_path / "scratch-new", tmp_path / "0123456789ab" / "bf16", tmp_path / "notes"]
    for folder in (*left, *kept):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    long_ago = time.time() - 25 * 60 * 60
    for folder in (*left, kept[1], kept[2]):
        os.utime(folder, (long_ago, long_ago))
    checkpoints.scratch()
    assert [folder.exists() for folder in (*left, *kept)] == [False] * 2 + [True] * 3
