"""The doctor: what it makes of reports, of exceptions and of any bytes at all."""

# ruff: noqa: RUF001  # Chinese has its own punctuation

import ast
import gzip
import html
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import traceback
import unicodedata
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers import diagnose
from helpers.doctor import catalogue, evidence, rules, statements, verdict, words
from helpers.doctor.command import main
from helpers.doctor.share import block, scrub
from helpers.doctor.text import diagnose_text

ROOT = Path(__file__).parents[1]
DOCTOR = ROOT / "helpers" / "doctor"
REPORTS = json.loads((ROOT / "tests" / "data" / "reports.json").read_text("utf-8"))["reports"]
HEADLINE = "RuntimeError: FlashAttention only support fp16 and bf16 data type"
LABELS = set(catalogue.labels())


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    monkeypatch.delenv("LANGUAGE", raising=False)
    words.choose("en")


def known_gap(report):
    """A mark for what the doctor gets wrong, with the reason; getting it right fails the test."""
    return [pytest.mark.xfail(reason=report["gap"], strict=True)] if "gap" in report else []


@pytest.mark.parametrize(
    "report", [pytest.param(one, id=one["id"], marks=known_gap(one)) for one in REPORTS]
)
def test_a_report(report):
    found = diagnose_text(report["text"])
    if report["cause"] is None:
        assert (found.cause, found.candidates) == (None, ())
    elif report["decides"]:
        assert found.cause in {report["cause"], *report["acceptable"]}
        assert found.certain
        assert found.fixes[0].label in report["fixes"]
    else:
        assert (found.cause, found.certain) == (None, False)
        assert len(found.candidates) >= 2
        assert found.next_check
        assert {fix.cause for fix in found.fixes} <= set(found.candidates)
        assert len(found.fixes) == len({(fix.label, fix.code) for fix in found.fixes})
    assert not {found.cause, *found.candidates} & set(report["ruled_out"])
    assert found.is_failure is report["is_failure"]


def wrapped(text):
    return "\n".join(line[i : i + 80] for line in text.split("\n") for i in range(0, len(line), 80))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\n".join(f"[rank3]: {line}" for line in text.split("\n")),
        lambda text: "\n".join(f"> {line}" for line in text.split("\n")),
        lambda text: "\n".join(f"\x1b[31m{line}\x1b[0m" for line in text.split("\n")),
        lambda text: f"{text}\n{text}",
        wrapped,
    ],
    ids=["crlf", "rank", "quoted", "colours", "twice", "wrapped"],
)
def test_how_a_message_was_carried_changes_nothing(change):
    texts = [f"{HEADLINE}\n", "RuntimeError: query and key must have the same dtype"]
    texts += ["RuntimeError: FlashAttention only supports Ampere GPUs or newer."]
    texts += ["We will cast back the input in torch.float32.\n" + HEADLINE]
    for text in texts:
        was, now = diagnose_text(text), diagnose_text(change(text))
        assert (now.cause, now.candidates) == (was.cause, was.candidates)
        assert was.candidates


@pytest.mark.parametrize("word", ["float32 ", "q.dtype ", "without ", "是 float32, "])
def test_no_sentence_is_longer_than_what_is_read_of_one(word):
    """Sentences are searched once for each dtype in them: the square of their length."""
    lines = [word * 9000, word * 9000, f"print(q.dtype, k.dtype) # {word * 900}", "float32 " * 900]
    sentences = [*statements._sentences("\n".join(lines))]
    assert sentences
    assert max(map(len, sentences)) <= statements.LONG + len(" float32")


@pytest.mark.parametrize("lines", [10, 5_000, 50_000])
@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
def test_what_is_written_around_a_log_of_any_length_is_read(lines, behind):
    marks = ("".join(chr(97 + (i >> 4 * k) % 16) for k in range(5)) for i in range(lines))
    log = "".join(f"batch {mark} of the run is done\n" for mark in marks)  # no two lines are one
    words = "It is DoRA: use_dora=True is set, and without DoRA it works.\n"
    text = f"{log}{HEADLINE}\n{words}" if behind else f"{words}{log}{HEADLINE}\n"
    found = diagnose_text(text)
    assert found.cause == "adapter-fp32"
    assert "code" in [one.what for one in found.evidence]


def test_a_mail_that_breaks_its_lines_changes_few_answers():
    def mailed(line):
        if len(line) <= 72 or line.startswith((" ", "\t")):
            return line
        return "\n".join(textwrap.wrap(line, 72, break_long_words=False, break_on_hyphens=False))

    texts = [report["text"] for report in REPORTS]
    mails = ["\n".join(map(mailed, text.split("\n"))) for text in texts]
    changed = [
        text
        for text, mail in zip(texts, mails, strict=True)
        if diagnose_text(text).cause != diagnose_text(mail).cause
    ]
    assert sum(map(str.__ne__, texts, mails)) > len(texts) / 2
    assert len(changed) <= len(texts) / 100, changed


@given(st.binary(max_size=400) | st.text(max_size=400))
def test_any_bytes_get_an_answer(content):
    found = diagnose_text(content)
    assert found.summary
    assert json.loads(found.to_json())["cause"] == found.cause
    assert str(found)


def test_what_is_no_text_is_called_that(tmp_path):
    packed = gzip.compress(HEADLINE.encode() * 100 + bytes(range(256)))
    for content in (packed, Path(sys.executable).read_bytes()[:100_000]):
        assert "not look like text" in diagnose_text(content).looks_like
    for name in ("utf-8", "utf-16", "gb18030"):
        assert diagnose_text("只是一段文字 and nothing more".encode(name)).looks_like == ""


@given(st.text(max_size=200), st.text(max_size=200))
def test_what_stands_around_a_message_does_not_hide_it(before, after):
    found = diagnose_text(f"{before}\n{HEADLINE}\n{after}")
    assert found.is_failure
    assert found.candidates
    assert "gpu-too-old" in found.ruled_out


@pytest.mark.parametrize(
    "broken",
    [
        "rules._loads",
        "rules._cured",
        "statements.read",
        "evidence._calls",
        "text.remedies",
        "text._next_check",
    ],
)
def test_a_bug_in_one_part_does_not_hide_the_others(monkeypatch, caplog, broken):
    module, name = broken.split(".")
    module = importlib.import_module(f"helpers.doctor.{module}")

    def fails(*_arguments):
        raise ZeroDivisionError

    if module is rules:
        there = [fails if rule.__name__ == name else rule for rule in rules.RULES]
        assert fails in there
        monkeypatch.setattr(verdict, "RULES", there)
    else:
        monkeypatch.setattr(module, name, fails)
    found = diagnose_text(f"We will cast back the input in torch.float32.\n{HEADLINE}")
    assert found.cause == "weights-fp32"
    assert "ZeroDivisionError" in caplog.text


def test_every_label_of_the_data_is_one_of_the_catalogue():
    signs = evidence.load("signs.json")["signs"]
    used = {sign["cause"] for sign in signs if "cause" in sign and sign["cause"][:8] != "headline"}
    for sign in signs:
        used |= {*sign.get("for", ()), *sign.get("against", ()), *sign.get("candidates", ())}
    assert used <= LABELS
    assert len({sign["id"] for sign in signs}) == len(signs)
    assert {*rules.FLOAT32, *verdict.PROVEN, *verdict.BEFORE_DTYPE} <= LABELS


def test_every_set_of_candidates_has_a_check():
    checks = evidence.load("checks.json")
    for sign in evidence.load("signs.json")["signs"]:
        labels = set(sign.get("candidates", ()))
        assert any(labels <= checks[means].keys() for means in ("stands", "names", "shows")), sign


def test_every_mark_of_a_sign_is_explained_and_read():
    data = evidence.load("signs.json")
    known = {"id", "kind", "in", "any", "match", "near", "negatable", "cause", "rank", "for"}
    known |= {"against", "means", "what", "harmless", "stage", "candidates", "given", "unless"}
    carried = {key for sign in data["signs"] for key in sign} - known
    assert carried == set(data["marks"])
    code = "".join(path.read_text("utf-8") for path in DOCTOR.glob("*.py"))
    asked = set(re.findall(r'(?:has|entry\.get)\("(\w+)"\)', code)) - known
    others = {x for one in data["signs"] for x in (*one.get("given", ()), *one.get("unless", ()))}
    assert asked | others & carried == carried
    said = {"transformers 5"} | {
        f"{what} {subject}" for what in ("float32", "half") for subject in statements.SUBJECTS
    }
    assert others <= carried | {sign["id"] for sign in data["signs"]} | said
    acts = {"cause", "candidates", "for", "against", "harmless", "what", "stage", *data["marks"]}
    assert [one["id"] for one in data["signs"] if not acts & one.keys()] == []
    stages = {sign["stage"] for sign in data["signs"] if "stage" in sign}
    assert stages == set(re.findall(r'stage\("(\w+)"\)', code))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("RuntimeError: FlashAttention only supports Ampere GPUs or newer.\non an A800", "A800"),
        (
            "Requirement already satisfied: flash_attn in /env/site-packages (2.5.7)\nImportError:"
            " This modeling file requires the following packages that were not found in your"
            " environment: flash_attn.",
            "already satisfied: flash_attn",
        ),
    ],
)
def test_what_makes_a_message_doubtful_is_shown(text, line):
    found = diagnose_text(text)
    assert found.cause is None
    assert "flash-attn-abi-mismatch" in found.candidates
    assert [line in shown.text for shown in found.evidence] == [False, True]


def test_a_gpu_that_cannot_have_raised_the_message_is_named():
    found = diagnose_text(f"{HEADLINE}\non a T4")
    (told,) = [one.means for one in found.evidence if one.text == "T4"]
    assert "does not run on this GPU" in told
    both = diagnose_text(f"{HEADLINE}\na T4 and an A100")
    assert not [one for one in both.evidence if "does not run" in one.means]
    amd = diagnose_text(f"{HEADLINE}\nMI250X, ROCm 6")
    assert "gpu-too-old" not in amd.ruled_out
    assert "flash-attn-missing" in amd.ruled_out


def test_what_is_quoted_stands_so_in_the_text():
    """Letters without anything between them are quoted only where a message was broken."""
    broken = []
    for report in REPORTS:
        text = unicodedata.normalize("NFKC", report["text"])
        lines = [evidence._compact(line.lower()) for line in text.split("\n")]
        for one in evidence.read(report["text"]).signs.values():
            squeezed = re.fullmatch(r"[a-z0-9\u4e00-\u9fff]{16,}", one.text)
            if squeezed and one.text not in text:
                broken.append(report["id"])
                assert not any(one.text in line for line in lines), one.text
    assert len(broken) < len(REPORTS) / 50


@pytest.mark.parametrize("speech", ["en", "zh-CN"])
def test_lines_to_run_fit_a_screen(speech):
    def columns(line):
        return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)

    with words.speaking(speech):
        checks = {diagnose_text(report["text"]).next_check for report in REPORTS}
    assert len(checks) > 20
    assert max(columns(line) for check in checks for line in check.split("\n")) <= 100


def test_a_message_is_cut_where_it_does_not_say_what_is_supported():
    cut = evidence.read("RuntimeError: FlashAttention only supp").signs
    assert "refusal-cut" in cut
    for end in ("fp16 and bf16 data type", "fp16", "Ampere GPUs or newer", "bfloat16"):
        assert "refusal-cut" not in evidence.read(f"FlashAttention only supports {end}").signs
        assert "refusal-cut" not in evidence.read(f"FlashAttention only support {end}").signs


@pytest.mark.parametrize(
    "text",
    [
        "Does FlashAttention 2 only support fp16 and bf16?",
        "FlashAttention 只支持 fp16 吗？",
        "The docs say: FlashAttention only supports fp16 and bf16. It runs, which do I take?",
        "现在运行正常，文档上说 flash attention 只支持fp16和bf16，请问选哪个好？",
    ],
)
def test_a_question_in_general_is_no_failure(text):
    found = diagnose_text(text)
    assert (found.cause, found.candidates, found.is_failure) == (None, (), False)


@pytest.mark.parametrize(
    ("versions", "keyword"),
    [("transformers 4.44.2", "torch_dtype="), ("transformers==5.22.2", " dtype=")],
)
def test_fixes_are_for_the_versions_of_the_text(versions, keyword):
    text = f"We will cast back the input in torch.float32.\n{HEADLINE}\n{versions}"
    assert keyword in diagnose_text(text).fixes[0].code


def test_every_module_is_one_that_python_3_9_reads():
    for path in DOCTOR.glob("*.py"):
        ast.parse(path.read_text("utf-8"), feature_version=(3, 9))


def test_the_text_doctor_imports_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import helpers.doctor.command as c;"
        " c.main(['--json', '-']);"
        " new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        " print(new - set(sys.stdlib_module_names), file=sys.stderr)"
    )
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    done = subprocess.run(command, input=HEADLINE, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "{'helpers'}"
    assert json.loads(done.stdout)["is_failure"] is True


@pytest.mark.parametrize(
    ("arguments", "status", "out"),
    [
        (["explain", "weights-fp32"], 0, "# weights-fp32"),
        (["explain"], 0, "padding-side"),
        (["explain", "nothing"], 2, "There is no page 'nothing'."),
        (["no-such-file.txt"], 2, "could not be read"),
        (["--frobnicate"], 2, "There is no option"),
        (["--lang", "tlh", "-"], 2, "There are no sentences in 'tlh'"),
    ],
)
def test_the_command(arguments, status, out, capsys):
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert out in printed.out + printed.err


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error on Windows")
def test_a_reader_that_has_enough_gets_no_traceback():
    command = [sys.executable, "-m", "helpers.doctor.command", "explain", "head-dim"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()  # before anything can have been written
        assert process.stderr.read() == b""


def test_a_file_is_read_and_the_status_says_whether_something_failed(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.write_text(HEADLINE)
    assert main([str(path)]) == 1
    path.write_text("how to bake bread")
    assert main([str(path)]) == 0
    assert "not a dtype problem" in capsys.readouterr().out


def test_a_report_block_has_nothing_of_the_person():
    text = (
        "File /home/anna/x.py hf_abcdefghijklmnopqrst anna@example.org C:\\Users\\Anna\\y.py"
        " token=s3cr3tvalue host: gpu-17.cluster https://anna:pw@example.org 10.1.2.3"
    )
    text += (
        " host gpu31.internal.acme.com db.acme.com:3306 my password is hunter2xyz 密码是 geheim99"
    )
    text += " https://hooks.slack.com/services/T0A1/B0C2/zYxWv https://github.com:443/x torch.io"
    cleaned = scrub(text).lower()
    for word in ("anna", "abcdefghij", "s3cr3t", "gpu-17", "10.1.2.3", "acme", "hunter2", "zyxwv"):
        assert word not in cleaned
    assert "geheim" not in cleaned
    assert "https://github.com:443/x torch.io" in cleaned


def test_a_name_of_a_home_folder_is_removed_wherever_it_stands(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "login7")
    cleaned = scrub("/home/berta/x.py wrote /scratch/berta/run on login7; alberta stays")
    assert "alberta stays" in cleaned
    for word in ("/berta", "login7"):
        assert word not in cleaned


@given(st.from_regex(r"[a-z]{3,12}(\.[a-z]{2,8})?@[a-z]{3,12}\.[a-z]{2,5}", fullmatch=True))
def test_no_mail_address_is_left(address):
    assert address not in scrub(f"from {address}: hello")


def test_a_line_without_end_is_cut_at_a_blank_in_a_report():
    text = "ok " + "hf_" + "a" * 2_000_000
    told = block(diagnose_text(text), text)
    assert len(told) < 3000
    assert "aaaa" not in told


@pytest.mark.parametrize("sign", evidence.load("signs.json")["signs"], ids=lambda sign: sign["id"])
def test_no_pattern_of_a_sign_runs_over_a_line_without_end(sign):
    """Two unbounded repetitions of a wide class take the square of a line's length."""
    wide = re.compile(r"(?:\[\^(?:[^\]\\]|\\.)*\]|\\[wWS]|(?<!\\)\.)(?:[*+]|\{\d+,\})")
    assert wide.findall("|".join(sign.get("match", ()))) == []


@pytest.fixture(scope="module")
def read_as():
    """All posts and phrases in the two forms in which signs look at them."""
    phrases = json.loads((ROOT / "tests" / "data" / "phrases.json").read_text("utf-8"))["phrases"]
    forms = {"compact": [], "flat": []}
    for text in [*(report["text"] for report in REPORTS), *chain(*phrases.values())]:
        for piece, _ in evidence._pieces(text):
            flat = evidence._flat(piece)
            forms["compact"].append(evidence._compact(flat))
            forms["flat"].append(statements.unwrapped(evidence.TORCH.sub("", flat)))
    return forms


@pytest.mark.parametrize("sign", evidence.load("signs.json")["signs"], ids=lambda sign: sign["id"])
def test_every_pattern_of_a_sign_is_what_somebody_says(sign, read_as):
    """A pattern that finds nothing is not read by anybody, and may be wrong."""
    assert [a for a in sign["any"] for b in sign["any"] if a != b and a in b] == []
    texts = [t for t in read_as[sign["in"]] if any(words in t for words in sign["any"])]
    assert texts
    for alternative in sign.get("match", ()):
        assert any(re.compile(alternative, re.M).search(text) for text in texts), alternative


def test_what_is_no_text_exception_or_model_is_refused():
    with pytest.raises(TypeError, match=r"diagnose\(\) got int: give"):
        diagnose(3)


def test_an_exception_and_its_text_get_the_same_answer():
    try:
        raise RuntimeError("query and key must have the same dtype")
    except RuntimeError as error:
        found = helpers.diagnose(error)
        text = "".join(traceback.format_exception(error))
    assert found.cause == diagnose_text(text).cause == "mixed-qkv-dtype"


@pytest.mark.parametrize(
    ("text", "not_this"),
    [
        ("I removed prepare_model_for_kbit_training, same error", "kbit-prep"),
        ("# model = prepare_model_for_kbit_training(model)", "kbit-prep"),
        ("from peft import LoraConfig, prepare_model_for_kbit_training", "kbit-prep"),
        ("把prepare_model_for_kbit_training注释掉了还是一样", "kbit-prep"),
        ("I am not using DoRA, and the error is the same", "adapter-fp32"),
        ("the lora weights aren't float32", "adapter-fp32"),
        ("I had float32 adapter weights but cast them to bf16 before this run", "adapter-fp32"),
        ("Neither RMSNorm nor rope is float32, I printed them", "upcast-module"),
        ("Is it possible that RMSNorm returns float32?", "upcast-module"),
        ("会不会是 RMSNorm 输出了 float32？", "upcast-module"),
        ("maybe the inputs_embeds are float32? I have not checked", "inputs-fp32"),
        ("should bnb_4bit_compute_dtype be float32?", "quantization-compute-dtype"),
        ("If the weights were float32 I would understand, but they are bfloat16", "weights-fp32"),
        ("Someone told me to load with torch_dtype=torch.float32, I did not", "weights-fp32"),
        ("weights = torch.tensor(class_weights, dtype=torch.float32)", "weights-fp32"),
        ("probs = nn.functional.softmax(logits, dim=-1, dtype=torch.float32)", "weights-fp32"),
        ("x = x.to(dtype=torch.float32)", "weights-fp32"),
        ("use_bf16: true\nuse_fp16: false", "weights-fp32"),
        ("crossencoder.py is open in my editor", "weights-fp32"),
        ('Qwen-7B-Chat", trust_remote_code=True, bf16=True).eval()', "weights-fp32"),
        ("transformers==5.22.2\nFlash Attention 2 without specifying a dtype", "weights-fp32"),
        ("I am on Fedora 40 and get this error.", "adapter-fp32"),
        ("class DatasetAdapter(Dataset):", "adapter-fp32"),
        ("prepare_model_for_export(model)", "kbit-prep"),
        ("set_printoptions(precision=32)", "missing-autocast"),
        ("logits = model(**x).logits.float()", "weights-fp32"),
        ("step 10 bf16=0.936 loss=1.2", "missing-autocast"),
        ("I did not pass bf16=True. Loaded with torch_dtype=torch.bfloat16.", "missing-autocast"),
    ],
)
def test_what_is_denied_guessed_or_of_something_else_decides_nothing(text, not_this):
    assert diagnose_text(f"{text}\n{HEADLINE}").cause != not_this


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("without LoRA it works, with LoRA it fails", "不加LoRA就正常，加了LoRA就报错"),
        ("I printed it: q_norm returns float32", "打印发现q_norm输出是float32"),
        ("the inputs_embeds that I pass are float32", "传的inputs_embeds是float32的"),
        ("inference is inside torch.autocast", "推理代码已经放在torch.autocast里了"),
        ("training script, I forgot bf16", "训练脚本，忘了加bf16"),
    ],
)
def test_chinese_that_touches_latin_letters_says_what_english_says(english, chinese):
    one, other = (diagnose_text(f"{text}\n{HEADLINE}") for text in (english, chinese))
    assert (one.cause, one.ruled_out) == (other.cause, other.ruled_out)
    assert one.cause or "missing-autocast" in one.ruled_out


COMMAND = """llamafactory-cli train \\
  --stage sft --do_train --model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
  --finetuning_type full --flash_attn fa2 \\
  --dataset a.jsonl --num_train_epochs 1
训练脚本如上。
"""


@pytest.mark.parametrize(
    "carry",
    [
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("gb18030"),
        lambda text: text.encode("utf-8-sig"),
        lambda text: json.dumps({"body": text}),
        lambda text: json.dumps({"body": text}, ensure_ascii=False),
        lambda text: html.escape(text).replace("\n", "<br/>\n"),
        lambda text: f"<pre><code>{html.escape(text)}</code></pre>",
        lambda text: "".join(f"trainer-1  | {line}\n" for line in text.split("\n")),
        lambda text: "".join(f"2024-05-01T10:00:00.1Z stderr F {x}\n" for x in text.split("\n")),
    ],
    ids=[
        "crlf",
        "utf-16",
        "gb18030",
        "bom",
        "json",
        "json-raw",
        "html",
        "pre",
        "docker",
        "kubernetes",
    ],
)
def test_how_a_file_was_written_changes_nothing(carry):
    text = f"{COMMAND}{HEADLINE}\n"
    was, now = diagnose_text(text), diagnose_text(carry(text))
    assert was.cause == "missing-autocast"
    assert (now.cause, now.ruled_out) == (was.cause, was.ruled_out)


def hard_wrapped(text):
    return "\n".join(line[i : i + 72] for line in text.split("\n") for i in range(0, len(line), 72))


def soft_wrapped(text):
    return "\n".join(textwrap.fill(line, 72) for line in text.split("\n"))


@pytest.mark.parametrize("wrap", [hard_wrapped, soft_wrapped])
def test_a_sentence_that_was_wrapped_is_read_to_its_end(wrap):
    told = "We printed all of them, one by one, and in the end found that the q_norm gives float32."
    text = wrap("We tried " * 16 + told)  # two lines that are full, before the sentence
    assert "q_norm" in text.split("\n")[2]
    assert "float32" in text.split("\n")[3]
    assert diagnose_text(f"{text}\n{HEADLINE}").cause == "upcast-module"


@pytest.mark.parametrize("lines", [100, 5_000, 40_000])
def test_what_is_written_before_and_behind_a_long_log_is_read(lines):
    names = (str(i).translate(str.maketrans("0123456789", "abcdefghij")) for i in range(lines))
    log = "".join(f"file {name} was read, and nothing is wrong with its rows\n" for name in names)
    told = "I printed it: the q_norm returns float32.\n"
    for text in (f"{told}{log}{HEADLINE}\n", f"{log}{HEADLINE}\n{told}"):
        assert diagnose_text(text).cause == "upcast-module"


def test_autocast_that_was_left_outweighs_the_flag_that_is_set():
    text = (
        "LoRA training with bf16=True works, and generate() fails.\n"
        "Casting fp32 inputs back to torch.bfloat16 for flash-attn compatibility.\n"
        "Casting fp32 inputs back to torch.float32 for flash-attn compatibility.\n"
    )
    found = diagnose_text(f"{text}{HEADLINE}")
    assert (found.cause, found.fixes[0].label) == ("missing-autocast", "wrap-in-autocast")


def test_an_error_behind_the_one_that_is_diagnosed_is_named():
    text = f"Yesterday:\n{HEADLINE}\nNow:\ntorch.cuda.OutOfMemoryError: CUDA out of memory."
    assert "memory" in diagnose_text(text).looks_like


def test_a_warning_above_a_job_that_failed_is_not_called_harmless():
    warning = "but the current dype in Qwen2ForCausalLM is torch.float32"
    assert diagnose_text(warning).cause == "warning-benign"
    found = diagnose_text(f"{warning}\nsrun: error: task 0: Exited with exit code 1")
    assert (found.cause, found.is_failure) == (None, True)


@pytest.mark.parametrize("text", ["", b"", "\n \t", b"\x00\x01"])
def test_without_a_letter_there_is_nothing_to_diagnose(text):
    found = diagnose_text(text)
    assert (found.cause, found.is_failure) == (None, False)
    assert found.looks_like.startswith("There is no text")
