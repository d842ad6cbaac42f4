"""The command of the doctor at a console, and what a block for a bug report keeps to itself."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.doctor import catalogue, command, share, text, words
from helpers.doctor.share import block, scrub
from helpers.doctor.text import diagnose_text

ROOT = Path(__file__).parents[1]
HEADLINE = "RuntimeError: query and key must have the same dtype"
COMMIT = "0251105a2fb19d2957484b7f023cd8c115286ced"


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    monkeypatch.delenv("LANGUAGE", raising=False)
    yield
    words.choose("en")


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(HEADLINE, "utf-8")
    return str(path)


def ran(*arguments, encoding, locale="C"):
    return subprocess.run(
        [sys.executable, "-m", "helpers.doctor.command", *arguments],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": locale},
    )


# A console


def test_a_console_without_the_marks_gets_others_that_are_not_that_of_undecided(tmp_path, log):
    assert ran(log, encoding="cp1252").stdout.startswith(b"x mixed-qkv-dtype: ")
    warning = tmp_path / "warning.txt"
    sign = "The input hidden states seems to be silently casted in float32"
    warning.write_text(f"{sign}, we will cast back the input in torch.bfloat16.\n{{'loss': 1.2}}")
    assert ran(str(warning), encoding="cp1252").stdout.startswith(b"ok warning-benign: ")
    whole = ran(log, encoding="utf-8").stdout.decode()
    assert whole.startswith("✖ ")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("arguments", [["explain", "kbit-prep"], ["-"]], ids=["page", "diagnosis"])
def test_a_terminal_gets_colours_and_code_that_can_be_copied(arguments, log):
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LC_ALL": "C.UTF-8"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "helpers.doctor.command", *arguments]
    with Path(log).open("rb") as asked, os.fdopen(ours, "rb", buffering=0) as terminal:
        with subprocess.Popen(
            command, stdin=asked, stdout=theirs, cwd=ROOT, env=environment
        ) as running:
            os.close(theirs)
            printed = b""
            while part := read_some(terminal):
                printed += part
        assert running.returncode in (0, 1)
    assert b"\x1b[1m" in printed or b"\x1b[1;31m" in printed
    shown = re.sub(r"\x1b\[[0-9;]*m", "", printed.decode()).replace("\r\n", "\n").split("\n")
    if arguments == ["-"]:
        assert shown == [*str(diagnose_text(HEADLINE)).split("\n"), ""]
    else:
        cause = catalogue.entry("kbit-prep")
        assert {*cause["failing"]["code"], *cause["fixed"]["code"]} <= set(shown)
        assert not [line for line in shown if line.startswith(("#", "```"))]


def read_some(terminal):
    try:
        return terminal.read(4096)
    except OSError:  # what Linux says where the other side is closed
        return b""


def test_what_else_a_console_lacks_is_a_question_mark():
    assert "✖ ✔ 中 é".encode("latin-1", "dtype-doctor") == b"x ok ? \xe9"


def test_chinese_by_name_is_written_in_utf_8_and_by_guess_in_english(log):
    chinese = "不一致"
    assert chinese in ran(log, "--lang", "zh-CN", encoding="cp1252").stdout.decode("utf-8")
    assert chinese in ran(log, encoding="gbk", locale="zh_CN.UTF-8").stdout.decode("gbk")
    guessed = ran(log, encoding="cp1252", locale="zh_CN.UTF-8").stdout
    assert b"are not of one dtype" in guessed


def test_json_at_such_a_console_loses_no_sign(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(f"{HEADLINE} ✖ 中", "utf-8")
    told = json.loads(ran(str(path), "--json", encoding="cp1252").stdout)
    assert any("✖ 中" in one["text"] for one in told["evidence"])


# What is asked


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--json", "--report"], "not both"), (["explain", "head-dim", "--report"], "of a page")],
)
def test_what_would_be_dropped_is_refused(arguments, sentence, capsys):
    assert command.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_page_as_json(capsys):
    assert command.main(["explain", "head-dim", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == catalogue.entry("head-dim")
    assert command.main(["explain", "--json"]) == 0
    assert [page["label"] for page in json.loads(capsys.readouterr().out)] == catalogue.labels()
    assert command.main(["explain", "head-dim", "--json", "--lang", "zh-CN"]) == 0
    chinese, english = json.loads(capsys.readouterr().out), catalogue.entry("head-dim")
    assert re.search("[\u4e00-\u9fff]", chinese["title"])
    assert chinese["failing"]["code"] == english["failing"]["code"]
    assert list(chinese) == list(english)


@pytest.mark.parametrize("content", [b"", b" \r\n\t", b"\x00\x01 1234 ---\n"])
def test_what_has_no_letter_is_no_text(content, log, capsys):
    with open(log, "wb") as file:  # noqa: PTH123
        file.write(content)
    assert command.main([log]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("There is no text: ")
    assert command.main([log, "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": printed.err.rstrip("\n")}


@pytest.mark.parametrize("content", ["面包", "a"])
def test_one_letter_of_any_script_is_a_text(content, log, capsys):
    with open(log, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(content)
    assert command.main([log]) == 0
    assert "not a dtype problem" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [(text, "diagnose_text"), (share, "block")])
def test_a_bug_of_ours_is_one_sentence(broken, log, monkeypatch, capsys):
    def fails(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(*broken, fails)
    assert command.main([log, "--report"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    sentence = r"The doctor itself failed \(ZeroDivisionError in command\.py:\d+\): .*\n"
    assert re.fullmatch(sentence, printed.err)


def test_a_bug_of_ours_as_json(log, monkeypatch, capsys):
    monkeypatch.setattr(text, "read", lambda _: 1 / 0)
    assert command.main([log, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "ZeroDivisionError in text.py:" in error


def test_stopping_it_is_no_traceback(log, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "diagnose_text", stopped)
    assert command.main([log]) == 130


@pytest.mark.parametrize("label", catalogue.labels())
def test_an_example_that_takes_something_from_the_guide_says_so_once(label):
    cause = catalogue.entry(label)
    code = [line for kind in ("failing", "fixed") for line in cause[kind].get("code", ())]
    borrows = any("checkpoints.get" in line for line in code)
    page = catalogue.page(label)
    assert page.count("`from helpers import backend, checkpoints`") == borrows
    if borrows:
        assert page.index("checkpoints.get") < page.index("`from helpers import")


# A block for a bug report


@pytest.mark.parametrize(
    ("pasted", "secrets"),
    [
        ("/home/jlin/x.py /scratch/users/jlin /cluster/work/group/jlin /data2/jlin", "jlin"),
        ("/scratch/users/jlin/a then /data2/jlin", "jlin"),
        ("/home/users/jlin/a (/data2/jlin, jlin_run, run-jlin)", "jlin"),
        ("SLURMD_NODENAME=gpu-node-17\ngpu-node-17: Traceback", "gpu-node-17"),
        ("HOSTNAME=alpha.example.org\nalpha: hello", "alpha"),
        ("host: gpu-node-17\n[gpu-node-17:123] hello", "gpu-node-17"),
        ("SLURM_NODELIST=rack[08-12],fat3\nrack10: x\nfat3: y", "rack10 fat3"),
        ("(base) jlin@zeus:~$ python x.py\n/data/jlin on zeus", "jlin zeus"),
        ("from jlin@laptop", "jlin laptop"),
        ("ssh-rsa AAAAB3NzaC1yc2EAAAADAQ== jlin@laptop", "AAAAB3 jlin laptop"),
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5", "AAAAC3"),
        ("C:\\Users\\Jun Lin\\x.py by Jun Lin", "Jun Lin"),
        ('"C:\\\\Users\\\\Jun Lin\\\\x.py" by Jun Lin', "Jun Lin"),
        ("C:/Users/Jun Lin/x.py", "Jun Lin"),
        ("from fe80::1ff:fe23:4567:890a, 2001:db8::7:1 and fd12::9: hello", "fe80 2001 db8 fd12"),
        ("at git.corp.com and node.internal", "git corp com node internal"),
        (f"https://anna:{COMMIT}@example.org key {COMMIT[:32]}", f"anna {COMMIT[:32]}"),
    ],
)
def test_what_concerns_the_person_is_gone(pasted, secrets):
    cleaned = scrub(pasted)
    for secret in secrets.split():
        assert secret not in cleaned
    assert scrub(cleaned) == cleaned


@pytest.mark.parametrize(
    "useful",
    [
        "c10::Error in std::string at::add c10::fa torch::dead 10:20:30",
        f"commit {COMMIT}",
        f"https://github.com/a/b/blob/{COMMIT}/x.py /tree/{COMMIT} /commit/{COMMIT}",
        f"models--a--b/snapshots/{COMMIT}/config.json",
        f"git+https://github.com/a/b@{COMMIT} transformers@{COMMIT}",
        "transformers@v4.44.2 peft@main torch==2.7.0",
        "threading.local() sklearn.cluster.KMeans google.protobuf.internal.decoder",
        "localhost:29500 scores = q @ k.mT",
        "/opt/conda/lib/python3.11/site-packages/torch/nn/modules/linear.py",
    ],
)
def test_what_is_useful_stays(useful):
    assert scrub(useful) == useful


def test_a_folder_of_a_common_name_takes_no_words_away():
    told = "/users/models/x.py /home/work/y: flash_attn of models for work"
    assert scrub(told).endswith(": flash_attn of models for work")


def test_a_text_of_windows_is_read_before_it_is_cleaned():
    pasted = f"{HEADLINE}\ntoken=s3cr3tvalue".encode("utf-16")
    told = block(diagnose_text(pasted), pasted)
    assert "query and key" in told
    assert "s3cr3t" not in told.replace("\0", "")


@given(st.from_regex(r"[a-z]{5}[0-9]", fullmatch=True), st.sampled_from([" ", "/", ":", "_", "-"]))
def test_a_known_name_is_gone_wherever_it_stands(name, sign):
    assert name not in scrub(f"/scratch/users/{name}/x\nx{sign}{name}{sign}x {name}")


PATTERNS = [
    *(pattern for pattern, _ in share.SECRETS),
    *(*share.HOMES, share.PROMPT, share.MACHINE, share.MACHINES, share.MAYBE_MACHINE),
]
LOOKALIKES = (
    *(" ", "a", "-", "a-", "a.", "1.", "f:", "::", "/home/", "a@", "token ", "token", "eyJ", "hf_"),
    *("host:", "nodelist=a,", "nodelist=a[1,", "commit ", "a://", "A", "0", "C:\\Users\\a "),
    *("ssh-rsa AAAA", "-----BEGIN PRIVATE KEY-----", "USER ", ".cluster", "\\", "~a"),
)


@pytest.mark.parametrize("end", LOOKALIKES)
def test_no_pattern_takes_the_square_of_a_text(end):
    """Ten times the text may take ten times the time, and not a hundred times."""

    def seconds(length):
        pasted = [
            (start + end * length)[:length] for start in ("", "token", "host", "ssh-rsa AAAA")
        ]
        begun = time.perf_counter()
        for one in pasted:
            for pattern in PATTERNS:
                pattern.sub("", one)
        return time.perf_counter() - begun

    assert min(seconds(20_000), seconds(20_000)) < 40 * max(min(seconds(2000), seconds(2000)), 1e-3)
