"""The doctor in Chinese: nothing is missing, nothing is lost, and the verdicts are the same."""

import ast
import gettext
import io
import json
import re
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import messages as tool

from helpers.doctor import catalogue, words
from helpers.doctor.command import main
from helpers.doctor.data import load
from helpers.doctor.share import block
from helpers.doctor.text import KINDS, diagnose_text

ROOT = Path(__file__).parents[1]
REPORTS = json.loads((ROOT / "tests" / "data" / "reports.json").read_text("utf-8"))["reports"]
HEADLINE = "RuntimeError: FlashAttention only support fp16 and bf16 data type"
HAN = re.compile("[\u4e00-\u9fff]")
FULL_WIDTH = "，。；：（）、"  # noqa: RUF001
# Of each branch: a cause, candidates, another cause, a warning, what is foreign, and what is not
# ours.
TEXTS = {
    "cause": f"Casting fp32 inputs back to torch.float32 for flash-attn compatibility.\n{HEADLINE}",
    "candidates": HEADLINE,
    "neighbour": "RuntimeError: mat1 and mat2 must have the same dtype, but got Float and Half",
    "warning": "The input hidden states seems to be silently casted in float32, we will cast back"
    " the input in torch.bfloat16.\n{'loss': 1.2}",
    "foreign": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "other": "Traceback (most recent call last):\nValueError: too many values to unpack",
    "nothing": "how to bake bread",
    "quoted": f"My script sets bf16=True and it works without DoRA.\n{HEADLINE}",
}


@pytest.fixture(autouse=True)
def english():
    words.choose("en")
    yield
    words.choose("en")


def translations():
    """The sentences and their translations, as they are on disk."""
    return {message.id: message.string for message in tool.translated() if message.id}


# The catalogue


def missing(catalog):
    return [m.id for m in catalog if m.id and (m.fuzzy or not m.string)]


def test_nothing_is_missing_fuzzy_or_left_over():
    updated = tool.updated()
    assert missing(updated) == []
    assert tool.po(updated) == tool.PO.read_bytes(), "the sentences have changed: make messages"
    assert b"#~" not in tool.PO.read_bytes()


def test_a_missing_and_a_changed_sentence_are_found(tmp_path, monkeypatch):
    catalog = tool.translated()
    catalog["Why it happens"].string = ""
    del catalog["What it is"]
    path = tmp_path / "doctor.po"
    changed = tool.po(catalog).replace(
        b'msgid "Easily mistaken for"', b'msgid "Easy to mistake for"'
    )
    path.write_bytes(changed)
    monkeypatch.setattr(tool, "PO", path)
    assert set(missing(tool.updated())) >= {"Why it happens", "What it is", "Easily mistaken for"}
    compiled = gettext.GNUTranslations(io.BytesIO(tool.mo(tool.updated())))
    assert compiled.gettext("Easily mistaken for") == "Easily mistaken for"
    assert compiled.gettext("Sources") != "Sources"


def test_what_is_compiled_is_what_is_written():
    compiled = tool.PO.with_suffix(".mo").read_bytes()
    assert tool.mo(tool.translated()) == compiled, "compile it: make messages"
    read = gettext.GNUTranslations(io.BytesIO(compiled))
    assert {id: read.gettext(id) for id in translations()} == translations()


def test_the_files_name_no_date_no_tool_and_no_line():
    header = tool.PO.read_text("utf-8").split("\n\n")[0]
    assert not re.search(r"\d{4}-\d\d|Generated-By", header)
    assert not re.search(r"^#: .*:\d", tool.PO.read_text("utf-8"), re.M)


def test_a_sentence_is_extracted_from_every_place(tmp_path):
    source = b'say("one" " two"); words.say("three"); noted("four"); say(entry["no"]); Says("no")\n'
    found = tool.extract_python(io.BytesIO(source), tool.KEYWORDS, (), {})
    assert [sentence for _, _, sentence, _ in found] == ["four", "one two", "three"]
    data = io.BytesIO(
        b'{"a": [{"b": "x"}, {"b": ""}, {}], "c": {"k": "y"}, "d": ["z # no", "x()  # w"]}'
    )
    options = {"paths": ["a.*.b", "c.*", "d.0", "d.1.#", "e.f"]}
    found = tool.extract_json(data, tool.KEYWORDS, (), options)
    assert [sentence for _, _, sentence, _ in found] == ["x", "y", "z # no", "w"]


def test_sentences_with_data_are_templates():
    for path in tool.DOCTOR.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in tool.KEYWORDS:
                built = (ast.JoinedStr, ast.BinOp)
                assert not isinstance(node.args[0], built), f"{path.name}:{node.lineno}"


PARTS = {
    "placeholder": r"\{\w*\}",
    "backticks": r"`[^`]+`",
    "address": r"https?://[^\s>]+",
    "number": r"\d+(?:\.\w+)*",
    "name": r"[A-Za-z][A-Za-z0-9]*(?:[_./:]+[A-Za-z0-9]+)+|[a-z]+[A-Z]\w+|(?<!\w)-{1,2}[a-z]\w+",
    "dtype": r"b?float16|float32|[bf]p?16|autocast|FlashAttention|DoRA|LoRA",
}


def lost(sentence, translation):
    """What a translation has to keep, and does not."""
    for part, pattern in PARTS.items():
        wanted = Counter(re.findall(pattern, sentence))
        if part in ("name", "number", "dtype"):  # may be said once where English says it twice
            yield from wanted.keys() - set(re.findall(pattern, translation))
        else:
            yield from (wanted - Counter(re.findall(pattern, translation))).elements()
    added = Counter(re.findall(PARTS["placeholder"], translation))
    yield from (added - Counter(re.findall(PARTS["placeholder"], sentence))).elements()


def test_names_numbers_code_and_placeholders_are_kept():
    found = {id: [*lost(id, said)] for id, said in translations().items()}
    assert {id: names for id, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("sentence", "translation"),
    [
        ("{a} of {b}", "{a} 的"),
        ("{a}", "{b}"),
        ("`torch.float32` is", "torch.float32 是"),
        ("since 2.7.4.post1", "从 2.7.4 起"),
        ("set bnb_4bit_compute_dtype", "设置"),
        ("see https://example.org/x", "见 https://example.org/y"),
        ("q is float32", "q 是 bfloat16"),
    ],
)
def test_what_is_lost_is_found(sentence, translation):
    assert [*lost(sentence, translation)]


def test_one_style_of_blanks_and_punctuation():
    wrong = re.compile(
        "[\u4e00-\u9fff][A-Za-z0-9`{]|[A-Za-z0-9`}][\u4e00-\u9fff]"  # a blank is missing
        f"| [{FULL_WIDTH}]|[{FULL_WIDTH}] "  # one too many
        "|[\u4e00-\u9fff][,;?!().]|[\u4e00-\u9fff]:(?!$)"  # half-width
    )
    found = {said: wrong.search(said) for said in translations().values()}
    assert [said for said, match in found.items() if match] == []
    for sentence, said in translations().items():
        ends = re.search(r"(?<![.])[.]$", sentence) is not None
        assert ends == said.endswith("。"), said


# What is shown


def english_in(text):
    """Three lower-case English words in a row, outside of code in backticks and of fences."""
    text = re.sub(r"```.*?```|`[^`\n]*`|<https?://\S+>", " ", text, flags=re.S)
    return re.findall(r"(?<![\w./-])[a-z]+(?: [a-z]+(?![\w./(=-])){2,}", text)


def shown(diagnosis):
    """The lines of a diagnosis, without what was pasted; of code the comments alone, unwrapped."""
    code = diagnosis.next_check.replace("\n#   ", " ").split("\n")
    for fix in diagnosis.fixes:
        code += fix.code.split("\n")
    left = {f"    {line}": line.partition("# ")[2] for line in code}
    for one in diagnosis.evidence:
        left.update(dict.fromkeys(f"  {one.what}: {one.text}".split("\n"), ""))
    lines = str(diagnosis).replace("\n    #   ", " ").split("\n")
    page = "\n".join(left.get(line, line) for line in lines)
    return page.replace(diagnosis.looks_like, diagnosis.looks_like.partition(": ")[0])


class Missed(gettext.NullTranslations):
    """Keeps every sentence that was said and has no translation."""

    def __init__(self):
        super().__init__()
        self.sentences = set()

    def gettext(self, message):
        self.sentences.add(message)
        return message


@pytest.fixture
def missed(monkeypatch):
    translated = gettext.GNUTranslations(io.BytesIO(tool.PO.with_suffix(".mo").read_bytes()))
    found = Missed()
    translated.add_fallback(found)
    monkeypatch.setattr(words, "_catalogue", lambda _language: translated)
    return found.sentences


def test_every_diagnosis_is_in_chinese(missed):
    with words.speaking("zh-CN"):
        quoted = set(map(words.say, KINDS.values()))
        for text in [*TEXTS.values(), *(report["text"] for report in REPORTS)]:
            found = diagnose_text(text)
            assert english_in(shown(found)) == []
            said = [found.summary, *(one.what for one in found.evidence)]
            said += [one.means for one in found.evidence]
            said += [word for fix in found.fixes for word in (fix.title, words.say(fix.safety))]
            said += [one.text for one in found.evidence if one.what not in quoted]
            assert [one for one in said if not HAN.search(one)] == []
    assert missed == set()


def test_every_page_is_in_chinese(missed):
    with words.speaking("zh-CN"):
        pages = [catalogue.page(label) for label in catalogue.labels()]
        index = catalogue.index().split("\n")
    assert [found for page in pages for found in english_in(page)] == []
    for line in re.sub(r"```.*?```", "", "\n".join(pages), flags=re.S).split("\n"):
        code_alone = line.startswith("- `")
        assert not line or code_alone or HAN.search(line), line
    assert all(HAN.search(line) for line in index)
    assert missed == set()


def test_a_live_diagnosis_is_in_chinese(missed):
    import torch

    from helpers.doctor.live import why

    def attention(q, v):
        raise RuntimeError(HEADLINE.partition(": ")[2])

    with words.speaking("zh-CN"):
        try:
            attention(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
        except RuntimeError as error:
            found = why(error)
        assert english_in(shown(found)) == []
        reason = next(one for one in found.evidence if one.what == words.say("model"))
    assert HAN.search(reason.text)
    assert found.cause == "upcast-module"
    assert missed == set()


@pytest.mark.parametrize("branch", TEXTS)
@pytest.mark.parametrize("option", [[], ["--report"]], ids=["page", "report"])
def test_the_command_speaks_chinese(branch, option, tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.write_text(TEXTS[branch], "utf-8")
    main([str(path), "--lang", "zh-CN", *option])
    with words.speaking("zh-CN"):
        found = diagnose_text(TEXTS[branch])
        expected = block(found, TEXTS[branch]) if option else str(found)
    assert capsys.readouterr().out.rstrip() == expected.rstrip()
    assert HAN.search(expected)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["explain", "nothing"], 2),
        (["explain", "{known} {0}"], 2),
        (["no-such-file-{name}.txt"], 2),
        ([str(ROOT)], 2),
        (["--frobnicate-{option}"], 2),
        (["one", "two"], 2),
    ],
)
def test_help_and_refusals_are_in_chinese(arguments, status, capsys, missed):
    assert main([*arguments, "--lang", "zh_CN"]) == status
    printed = "".join(capsys.readouterr())
    if arguments != ["--help"]:
        assert arguments[-1] in printed or arguments == ["one", "two"]
    lines = [line for line in printed.split("\n") if line and not line.startswith("      dtype-")]
    assert all(HAN.search(line) for line in lines)
    assert english_in(printed) == []
    assert missed == set()


def test_the_guides_commands_are_missed_in_chinese(monkeypatch, capsys):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    monkeypatch.delenv("LANGUAGE", raising=False)
    monkeypatch.setitem(sys.modules, "helpers.cli", None)
    assert main(["xray"]) == 2
    said = capsys.readouterr().err
    assert HAN.search(said)
    assert english_in(said) == []


def test_english_is_found():
    assert english_in("权重是 float32, the weights are wrong。")
    assert not english_in("权重 `the weights are wrong` torch.float32 attn_implementation")


# What does not depend on the language


def labels(found):
    return (
        found.cause,
        found.certain,
        found.candidates,
        found.ruled_out,
        found.is_failure,
        [(fix.label, re.sub("# .*", "", fix.code), fix.safety) for fix in found.fixes],
        len(found.evidence),
    )


def test_verdicts_are_the_same_in_both_languages():
    for text in [*TEXTS.values(), *(report["text"] for report in REPORTS)]:
        found = labels(diagnose_text(text))
        with words.speaking("zh-CN"):
            assert labels(diagnose_text(text)) == found


def test_json_has_english_keys_and_labels(tmp_path, capsys):
    known = load("fixes.json")["fixes"]
    path = tmp_path / "log.txt"
    for text in TEXTS.values():
        path.write_text(text, "utf-8")
        main([str(path), "--json", "--lang", "en"])
        english = json.loads(capsys.readouterr().out)
        main([str(path), "--json", "--lang", "zh-CN"])
        chinese = json.loads(capsys.readouterr().out)
        assert list(chinese) == list(english)
        assert [list(one) for one in chinese["evidence"]] == [list(e) for e in english["evidence"]]
        for key in ("cause", "certain", "candidates", "ruled_out", "is_failure"):
            assert chinese[key] == english[key]
        for fix in chinese["fixes"]:
            assert fix["label"] in known
            assert fix["safety"] == known[fix["label"]]["safety"]


def test_braces_in_what_is_pasted_are_left_alone():
    line = "{label} {0} {reason!r} {"
    text = f"My model.norm returns float32 {line}\n{HEADLINE}\nKeyError: {line}"
    for language in words.LANGUAGES:
        with words.speaking(language):
            assert line in block(diagnose_text(text), text)
            assert str(diagnose_text(f"Traceback (most recent call last):\nKeyError: {line}"))


# Which language


@pytest.mark.parametrize(
    ("name", "language"),
    [
        *(
            (name, "zh-CN")
            for name in ("zh-CN", "zh_CN", "zh", "ZH-cn", "zh_cn", "zh-TW", "zh-Hans")
        ),
        *((name, "en") for name in ("en", "en-US", "EN_us", "en_GB")),
    ],
)
def test_a_language_is_taken_by_any_of_its_names(name, language):
    assert words.choose(name) == language
    with words.speaking(name) as spoken:
        assert spoken == language


@pytest.mark.parametrize("name", ["", "tlh", "zha", "zh-CNX", "english!", "en zh", "de_DE", "中文"])
def test_another_is_refused_in_one_sentence(name, capsys, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    words.choose("zh-CN")
    with pytest.raises(ValueError, match="没有"):
        words.choose(name)
    assert words.say("Sources") != "Sources", "the language before has been given up"
    with pytest.raises(ValueError, match="没有"), words.speaking(name):
        pass
    assert main(["--lang", name, "explain"]) == 2
    assert (
        capsys.readouterr().err == f"There are no sentences in {name!r}: en and zh-CN are there.\n"
    )


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh-CN"),
        ({"LANG": "zh_TW.Big5"}, "zh-CN"),
        ({"LANG": "zh_HK.UTF-8@radical"}, "zh-CN"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh-CN"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, "zh-CN"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en"}, "zh-CN"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en:zh_CN"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "de:zh"}, "zh-CN"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "de:fr"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": ""}, "zh-CN"),
        ({"LANG": "C", "LANGUAGE": "zh_CN"}, "en"),
        ({"LANG": "POSIX", "LANGUAGE": "zh_CN"}, "en"),
        ({"LANGUAGE": "zh_CN"}, "en"),
    ],
)
def test_the_locale_is_asked_as_gettext_asks(environment, language, monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as linux:
        linux.setattr(words.os, "name", "posix")
        assert words.guess() == language


@pytest.mark.parametrize(
    ("number", "name", "language"),
    [
        (0x0804, "English_United States", "zh-CN"),  # the windows are Chinese, the formats are not
        (0x0404, None, "zh-CN"),
        (0x0409, "Chinese (Simplified)_China", "en"),
        (0x0407, None, "en"),
        (None, "Chinese (Simplified)_China", "zh-CN"),
        (None, "Chinese (Traditional)_Hong Kong SAR", "zh-CN"),
        (None, "English_United Kingdom", "en"),
        (None, None, "en"),
    ],
)
def test_windows_is_asked_for_its_own_language(number, name, language, monkeypatch):
    import ctypes
    import locale

    for variable in ("LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE"):
        monkeypatch.delenv(variable, raising=False)
    kernel32 = SimpleNamespace()
    if number is not None:
        kernel32.GetUserDefaultUILanguage = lambda: number
    with monkeypatch.context() as windows:
        windows.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
        windows.setattr(locale, "getlocale", lambda: (name, "cp936"))
        windows.setattr(words.os, "name", "nt")
        assert words.guess() == language


def test_a_block_of_one_thread_leaves_the_others_alone():
    both, spoken = threading.Barrier(2, timeout=10), {}

    def speak(language):
        with words.speaking(language):
            both.wait()
            spoken[language] = words.say("Sources")
            with words.speaking("en"):
                both.wait()
                spoken[f"{language}, inside"] = words.say("Sources")
            both.wait()
            spoken[f"{language}, after"] = words.say("Sources")

    threads = [threading.Thread(target=speak, args=(name,)) for name in words.LANGUAGES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert spoken == {
        "en": "Sources",
        "en, inside": "Sources",
        "en, after": "Sources",
        "zh-CN": "来源",
        "zh-CN, inside": "Sources",
        "zh-CN, after": "来源",
    }
    assert words.say("Sources") == "Sources"


def test_an_exception_restores_the_language_before():
    with pytest.raises(KeyError), words.speaking("zh-CN"):
        raise KeyError
    assert words.say("Sources") == "Sources"


@pytest.mark.parametrize(("language", "loaded"), [("en", []), ("zh-CN", ["gettext"])])
def test_from_an_archive_gettext_alone_is_loaded_and_only_for_chinese(language, loaded, tmp_path):
    archive = tmp_path / "doctor.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(ROOT / "helpers" / "__init__.py", "helpers/__init__.py")
        for path in tool.DOCTOR.rglob("*"):
            if path.suffix in (".py", ".json", ".mo"):
                file.write(path, path.relative_to(ROOT).as_posix())
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r});"
        " from helpers.doctor.command import main;"
        f" main(['--lang', {language!r}]);"
        " print([name for name in ('gettext', 'babel') if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-I", "-X", "utf8", "-c", code]
    done = subprocess.run(
        command, input=HEADLINE, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stderr.strip() == repr(loaded)
    assert bool(HAN.search(done.stdout)) == (language == "zh-CN")
