"""What sentences say: of what dtype something is, and without what it works.

People write the decisive fact in a sentence: "q_norm returns float32", "without DoRA it works".
The same few words say it in every report, in English and in Chinese, so a sentence is read for what it
is about (a norm, an input, an adapter, the weights), for a dtype, and for what works or is left out.
"""

# ruff: noqa: E501, RUF001  # patterns are not broken, and Chinese has its own punctuation
import re
from collections.abc import Iterator
from typing import NamedTuple, Optional

from helpers.doctor.data import pattern

MOST = 2000  # sentences that are read; prose is short, and logs have been read for signs
LONG = 500  # characters of a sentence

SUBJECTS = {
    "kbit": r"prepare_model_for_\w+|prepare_for_kbit|k-?bit[ _](?:training|prep\w*)",
    "dora": r"\bdora\b|use_dora|lora_magnitude\w*|magnitude",
    "lora": r"\b[\w.]{0,80}lora_\w+[\w.]*|\b(?:q|v|lora)?_?lora\w*(?: (?:params?|parameters?|weights?|layers?))?|disable_adapter\w*|\bpeft\w*|adapters?\b|适配器|\blora权重",
    "compute": r"(?:bnb_4bit_)?compute[_ ]?dtype|de-?quanti[sz]\w*|反量化",
    "fp8": r"\S*fp8\b",
    "quant": r"\bload_in_[48]bit|[48]-?bits?\b|quanti[sz]\w*|\bqlora|量化|\bnf4\b|bitsandbytes|\bbnb\b",
    "norm": r"\bf\.normalize\b|\w*norms?\d*(?:_[qkv])?\b|rmsnorm\w*|layer_?norm\w*|\bqk[_-]?norm\w*|\bapex\b|\bln_?[\dqkv]\b|归一化",
    "rope": r"\brope\w*|rotary\w*|\bposition(?:al)?[ _]embed\w*|\bpos_?emb\w*|\bcos\b|\bsin\b|inv_freq|freqs?_?cis|旋转位置|位置编码|freqs?\b",
    "module": r"logit_scale\w*|scale_mul\w*|modulation|time_?step\w*|\btemb\w*|gate_msa|\bt_?emb\b|attention mask bias|alibi",
    "q": r"\bq[ 、,/]*k?[ 、,/]*v?\b|query(?:_states)?\b|attention inputs?",
    "input": r"inputs?_embeds?|prompt_embeds|\bembeds?\b(?! layers?)|image_features?|input_features|pixel_values\w*"
    r"|latents?\b|(?:image|audio|vision|video|speech|图像|音频) ?features?|\bdumped\b|precomputed(?! (?:based|from|by|in))|soft[ _]?prompts?"
    r"|特征|\bdescriptors?\b|\bdesc\d\b|\b(?:\w+_)?feats?\b|\.np[yz]\b|\bnpz\b|prefix_\w+|\bcollat\w+|\bdata_?loader|\bnumpy\b|\binput (?:tensors?|embeddings?)|\bthe inputs?\b|输入",
    "ids": r"input_ids|token ids|text[- ]only|纯文本",
    "mode": r"\bevaluat\w*|\bvalidat\w*|\bsampling\b|\bcallback\w*|评估|验证|采样|回调",
    "attention": r"attn_implementation|set_attention_backend|\bsdpa\b|\beager\b|flash[_ -]?att\w*|\bfa2\b|xformers",
    "autocast": r"\bautocast\w*|\bmixed[ _-]precision\b|\bamp\b|混合精度",
    "full": r"full[- ](?:parameter )?fine-?\s?tun\w*|(?:normal|regular|plain|ordinary|standard) tr\w{1,4}ning|full[- ]param\w*|全参数?微?调?|全量微?调?",
    "weights": r"param(?:eter)?s?\b|weights?\b|checkpoints?\b|safetensors|\bmodel\b|state_dict|\bconfig\b"
    r"|\b\w+_config\b|encoders?\b|towers?\b|backbone|权重|底座|参数|模型|检查点|[qkvo]_proj\.weights?|lm_head|linear layers?",
}
_TO_HALF = r"['\"]?\s*[=:]\s*['\"]?(?:torch\.)?(?:b?float16|bf16|fp16|half)\b"
REMEDIES = {
    "flag": r"--(?:bf16|fp16)\b|\b(?:bf16|fp16)['\"]? ?[=:] ?['\"]?true|\bamp ?= ?true|mixed_precision|--precision",
    "q": r"\b(?:q|query\w*|kv?|key\w*)\b[^\n]{0,12}=\s*\(?[\w.]+\.(?:to|half|bfloat16|type)\("
    r"|\bcast\w* (?:back )?(?:the )?(?:q|query)\b[^\n]{0,30}\bto (?:bf16|fp16|half|b?float16)",
    "compute": SUBJECTS["compute"],
    "load": rf"(?<!compute_)(?:torch_)?dtype{_TO_HALF}|(?<!compute_)\btorch_dtype\b|model_kwargs",
    "autocast": r"\bautocast\w*",
    "lora": r"\blora\w*(?: \w+)?[^\n]{0,10}(?:\bto\b|成|为) ?(?:bf16|fp16|half|b?float16)\b",
    "norm": r"\w*norms?\b[^\n]{0,30}\.(?:to|half|bfloat16)\(|(?:cast\w*|转)[^\n]{0,20}\w*norms?\b",
    "input": r"\b\w*(?:feat|embed|latent|pixel|input|mel|image|audio|mask|batch)\w*"
    r"(?:\s*=\s*[\w.{: ]{1,40})?\.(?:half|bfloat16|to)\(|" + SUBJECTS["input"],
}
HEADLINE = "flashattention only support fp16 and bf16 data type"  # names dtypes, and states none
PROGRAMS = (
    "silently casted in float32",
    "inputs back to",
    "cast back the input",
    "but the current dype",
    "dtype-doctor:",
    "traceback (most recent call last)",
)
_SUBJECT = pattern("|".join(f"(?P<{name}>{source})" for name, source in SUBJECTS.items()))
_REMEDY = pattern("|".join(f"(?P<{name}>{source})" for name, source in REMEDIES.items()))
_FLOAT = pattern(
    r"(?<![\w-])(?:float32|float64|fp32|float 32|单精度)(?![\w-])|(?<!logits)(?<!loss)(?<!labels)(?<!scores)\.float\(\)|\bfp32(?=[^\w-])"
    r"|(?:是|成|为|\bto|\bis|\bare|\bas|\bin) ?(?:float|fp32)\b"
)
_HALF = pattern(
    r"(?<![\w-])(?:b?float16|bf16|fp16|half precision|半精度)(?![\w-])|\.half\(\)|\.bfloat16\(\)"
    r"|(?:是|成|为|\bto|\bis|\bare|\bas|\bin) ?half\b"
)
_EVERY = pattern(
    r"\b(?:all|every|everything(?! (?:runs?|works?|goes|is fine|trains?|else)\b)|each)\b|都|全|均|\{p\.dtype for|set\(p\.dtype"
)
_WORKS = pattern(
    r"\bworks?\b|\ball ?right\b|\bworked\b|\bhelps\b|\bhelped\b|\bfine\b(?![- ]?tun)|\bruns\b|(?<!\bi )(?<!\bwe )(?<!\bto )\brun\b|\bran\b|\btrains?\b(?! on|\()|\bok\b|\bokay\b|no (?:error|problem|issue)s?"
    r"|\bsucceed\w*|goes away|is gone|disappear\w*|\bcures?\b|\bfixe[sd]\b|\bpasses\b|\bgo(?:es)? through\b"
    r"|正常|没问题|没有问题|没有这个问题|没事|不报(?:这个)?错|不再报错|就好|好了|可以(?:跑|运行|训练)?|搞定|再没|没再|成功|that was it|\bsolved\b|enough|\baccept(?:s|ed)\b|\bhappy\b|\ball good\b|能跑|能训|通过|解决|没报错|跑通|通了|\bgreen\b"
)
# What is said when a remedy has worked, and seldom of anything else.
_CURED = pattern(
    r"\bsolved\b|\bthat was it\b|\bworks? now\b|\bnow (?:it )?(?:works?|runs?|trains?)\b|\bdid the trick\b|\bwas enough\b"
    r"|\bis enough\b|\bfixe[sd] (?:it|this|the)\b|\bresolve[sd]?\b|\b(?:error|it) (?:is gone|goes away|went away|disappear\w*)"
    r"|\bturned out\b|\baccepted\b|\bhappy\b|\ball good\b|不报(?:这个)?错|可以跑完|能跑了|可以了|就好了|就没事了?|搞定|解决了|再没(?:有)?(?:出现|报)|不再报|不报了|没再报|成功了|就行了|就ok|就通了"
)
_NOT_WORKS = pattern(
    r"(?:doesn'?t|does not|not|never|won'?t|didn'?t|no longer|cannot|can'?t|haven'?t|hasn'?t) (?:\w+ )?(?:work|run|ran|tr[iy]\w*|train|help|fine|ok)"
    r"|(?:还没|没有?)\s?(?:试|单独|验证|跑)|不正常|不可以|不能跑|跑不|没用|不行|没效果|无效|没解决"
)
_LEFT_OUT = pattern(
    r"\bwithout\b(?! (?:(?:any |a )?(?:problem|issue|error|hitch|word|trouble)|complain))|\bwith no\b(?! (?:problem|issue|error))|\bdisable_\w+|\bremov\w+|\bdisabl\w+|\bskip\w*|\bdrop\w*|\bcomment\w* (?:it |that |this )?out|\boff\b"
    r"|\bnot us\w+|\bdon'?t (?:open|use|enter|wrap|call|load|add|apply)|\bdelet\w+|\bpatch\w* \w* ?out|\bunload\w*|(?:[:=]|\bto) ?false\b|\binstead of\b|\bnon-|\bnn\.identity\b"
    r"|去掉|不加|不用|不挂|不带|关掉|关闭|禁用|注释|删掉|换成|换回|不开|不加载|去除|不做|跳过|卸载|非|不量化|未量化|\bunquanti[sz]ed\b"
)
_ALONE = pattern(r"\bbase(?: model)?\b|\balone\b|原始|原版|基座|只加载|单独")
_ONLY_WITH = pattern(
    r"\bonly (?:when|with|if|after|the)\b|\bas soon as\b|\bonce i\b|\bthe only (?:change|difference)\b|\bafter (?:adding|enabling|wrapping|attaching)"
    r"|\bflip (?:it )?to true|只有|一(?:开|加|用|挂|启用|打开)|加上|打开|开启|之后就|后就|之后才|后才"
)
_WITH = pattern(
    r"\b(?:add|set|(?<!forward )pass|cast|wrap|put|convert|chang|switch|us|enabl|specify|mak)(?:ing|t?ed|ped)?\b|^\W*with\b|\bif i (?:do|use|run|load)\b"
    r"|加上|加了|加个|补(?:了|上)|设(?:置|成|为|了)|改成|改为|传(?:入|了)?|指定|换成|包(?:上|了|在)|套(?:上|了)|转成|转换?为|手动"
)


_TURNED = pattern(
    r"\bbec[ao]mes?\b|\bturn(?:s|ed)?\b|\bcomes? out\b|\bcame out\b|\bends? up\b|\bpromot\w+|\bafter\b|->|→|=>"
    r"|成|变|提升|之后|以后|出来"
)


GUESSES = pattern(
    r"\b(?:is it possible|could it be|is it because|might be|may be|maybe|perhaps|i guess|i wonder|i suspect|what if|shouldn'?t)\b"
    r"|^\W*(?:should|is|are|does|do|did|can|could|would|will)\b[^\n]*\?\s*$|\bif (?:the|my|its?) [^.,]{0,40}\b(?:were|was)\b"
    r"|\bdon'?t know (?:where|which|what)\b|不知道(?:哪里|哪儿|哪个)|会不会|是不是|难道|有没有可能|可能是|也许|或许|怀疑|[^,，]{0,30}(?:吗|么|呢)\s*[?？]"
)
# "not float32", "none of them is float32", "cast back before": what stands before a dtype.
_DENIED = pattern(
    r"(?:\b(?:no|not|without|never|none|neither|nor)\b|n't\b|没有|不是|并非|没|无)[^,，;；]{0,40}$"
)
_PAST = pattern(r"\b(?:had|used to)\b[^.]{0,60}\bbut\b|\bbut (?:i )?cast|已经转|已转")
_MERGED = pattern(
    r"(?:\bmerg\w+|合并)[^.,，]{0,16}(?:之后|以后|后|\band it|\bagain|\bthen)|\bafter merging"
)
_REST = pattern(r"其余|其它|其他|剩下|\bthe rest\b|\bothers\b|everything else|all else")
_BECAME = pattern(
    r"(?:\b(?:come|comes|came) out as|\bends? up (?:as|in)|-> ?|→ ?|\bbec[ao]mes?|\bturn(?:s|ed)? (?:in)?to|\bpromoted to|\bupcast to|成了?|变成?|变为|提升到?|就是|\b(?:leave|leaves|left) (?:\w+ )?as)\s*$"
)


class Says(NamedTuple):
    """A sentence: what it is about, and "float32", "half", "all half", "turned" (from half to
    float32), "works without", "works with" (a remedy),
    "works" or "fails with"."""

    subject: str
    what: str
    text: str


def read(flat: str, most: int = MOST) -> "tuple[list[Says], int]":
    """What the first sentences of a text (lower case, dtypes without ``torch.``) say, and how many
    were read."""
    found: list[Says] = []
    count = 0
    for sentence in _sentences(flat.replace(HEADLINE, "")):
        count += 1
        if count > most:
            break
        if ELSEWHERE.search(sentence):
            continue
        guess = GUESSES.search(sentence)
        if guess:  # a guess or a question states nothing; what stands before its clause may
            sentence = sentence[: max(guess.start(), 0)].rpartition(",")[0]
        if _TAKEN_BACK.search(sentence):
            found = [one for one in found if one.what not in TRIED]
        found += _dtypes(sentence)
        found += _works(sentence)
    return found, count


TRIED = ("works", "works with", "works without", "fails with")


def around(flat: str, place: int) -> str:
    """The sentence at a place."""
    start, end = max(place - LONG, 0), place + LONG
    behind = _ENDS.search(flat, place, end)
    before = [match.end() for match in _ENDS.finditer(flat, start, place)]
    return flat[before[-1] if before else start : behind.end() if behind else end]


_ENDING = r"(?<=[a-z0-9)`\"'][.!?;])(?=\s|$)|(?<=[。！？；\n])"
_ENDS = pattern(_ENDING)
# Clauses that state something of their own.
_PARTS = pattern(
    _ENDING + r"|(?<=\w), (?=but |and then |so )|,(?=但|不过|可是|然而)",
)
ELSEWHERE = pattern(
    r"\b(?:colleague|friend|co-?worker|teammate)\b[^\n.]{0,40}\b(?:hit|had|got|saw|his|her|their)\b"
    r"|\bfixed it for (?:him|her|them)\b|\bback then\b|\blast (?:week|month|year|time)\b"
    r"|(?:an)?other (?:threads?|posts?|script|run|machine|project|model)\b|\bdifferent (?:script|run)\b"
    r"|(?:同事|朋友|同学|师兄|别人|他人|有人|网友|楼上)[^\n。,]{0,16}(?:遇到|碰到|也报|说是|的是)|他(?:们)?那(?:边|里)|他的(?:办法|情况|问题)"
    r"|昨天的(?:配置|版本|脚本)|\byesterday'?s\b"
    r"|上个?(?:月|周|次)|别的(?:机器|模型|项目|脚本)|另一个(?:模型|项目|脚本)",
    re.I,
)
_TAKEN_BACK = pattern(
    r"\bnot so sure\b|\bscratch that\b|\bnever ?mind\b|\bi was wrong\b|\bspoke too soon\b|收回|说错了|看错了|又不确定"
)


def unwrapped(flat: str) -> str:
    """A text without the line breaks of a mail or a terminal of up to WIDEST columns."""
    lines = flat.split("\n")
    short = [line for line in lines if len(line) <= WIDEST]
    columns = max(map(len, short), default=0)  # of a terminal, which cuts where it ends
    margin = max(map(len, filter(_is_prose, short)), default=0)  # of a mail, which leaves logs
    if columns < NARROWEST:
        return flat
    hard = sum(len(line) == columns for line in lines) > 1
    joined, before = lines[:1], lines[0]
    for line in lines[1:]:
        cut = hard and len(before) == columns
        prose = _is_prose(before) and len(before) > margin - 16 and not _begins(line)
        ends = before.endswith(ENDS) and not before.endswith("error:")
        if (cut or prose) and not (ends or line.startswith(STARTS)):
            joined[-1] += ("" if cut else " ") + line
        else:
            joined.append(line)
        before = line
    return "\n".join(joined)


NARROWEST, MARGIN, WIDEST = 40, 56, 120
ENDS = (".", ":", "{", "(", "[", ",", "\\")
STARTS = ("-", "*", ">", "#", "file ", "traceback", "`", "|", "+")


def _begins(line: str) -> bool:
    """Whether a line is the first of something: indented, empty, or the name of an exception."""
    return not line[:1].strip() or re.match(r"[\w.]{0,60}(?:error|exception)\b", line) is not None


def _is_prose(line: str) -> bool:
    return (
        line.count(" ") > 4
        and re.match(r"\S{0,60}error:|[\w.\[\]]{1,40}(?:, ?[\w.\[\]]{1,40}){0,5} ?= ?\S", line)
        is None
        and not line.startswith((" ", *STARTS))
        and len(line) >= MARGIN
    )


def _sentences(flat: str) -> Iterator[str]:
    before = ""
    in_frame = False
    for line in flat.split("\n"):
        is_code, line = in_frame and line[:1] == " " and "#" not in line, line[: 8 * LONG].strip()
        in_frame = is_code or line.startswith('file "')  # two frames of one file may be one line
        program = in_frame or any(words in line for words in PROGRAMS)
        if not line or program or (line.endswith("error:") and " " not in line):
            before = ""
            continue
        if before and re.fullmatch(r"[#->= {\[(]*(?:b?float(?:16|32)[\s,})\]]*)+", line):
            yield from _paired(before, line)
            before = ""
            continue
        shown = _SHOWN.match(line)
        if shown:
            yield from _paired(shown[1], shown[2])
            before = ""
            continue
        for sentence in _PARTS.split(line):
            if sentence.strip():
                yield sentence[:LONG]
        before = line


# What was asked for, and what was printed in a comment behind it.
_SHOWN = pattern(r"([^#]*\.dtype[^#]*)#[->= {\[(]*((?:b?float(?:16|32)[\s,})\]]*)+)$")


def _paired(asked: str, printed: str) -> Iterator[str]:
    """What was printed, beside what was asked for, one by one."""
    names = re.findall(r"[\w.()\[\]]*\.dtype", asked)
    dtypes = re.findall(r"b?float(?:16|32)", printed)
    if len(names) == len(dtypes) and names:
        for name, dtype in zip(names, dtypes):
            yield f"{name[:LONG]} {dtype}"
    else:
        yield f"{asked} {printed}"[:LONG]


def _about(sentence: str, place: int) -> "Optional[str]":
    """What is spoken of nearest before a place in a sentence, else behind it."""
    nearest, end = None, 0
    for match in _SUBJECT.finditer(sentence):
        if match.start() < place:
            # "the norm's weights" are the norm
            near = match.start() - end < 12
            joined = nearest in ("norm", "module") and match.lastgroup == "weights" and near
            # "a norm is one of what autocast runs in float32" speaks of the norm
            joined = joined or (nearest in ("norm", "rope") and match.lastgroup == "autocast")
            nearest, end = (nearest if joined else match.lastgroup), match.end()
        elif nearest is None:
            return match.lastgroup if match.start() - place < 40 else None
    return nearest


def _dtypes(sentence: str) -> Iterator[Says]:
    for spelling, what in ((_FLOAT, "float32"), (_HALF, "half")):
        for match in spelling.finditer(sentence):
            if _DENIED.search(sentence, 0, match.start()) or _PAST.search(sentence):
                continue
            subject = _about(sentence, match.start())
            if subject == "q" and what == "float32":
                subject = _maker(sentence, match.start()) or subject
            if subject == "weights" and what == "float32" and _REST.search(sentence):
                continue  # a few of them
            if subject is not None:
                if what == "float32" and _turned(sentence, match.start()):
                    yield Says(subject, "turned", sentence)
                if what == "float32" and re.search(SUBJECTS["kbit"], sentence):
                    yield Says("kbit", what, sentence)
                every = what == "half" and _EVERY.search(sentence) and not _FLOAT.search(sentence)
                yield Says(subject, "all half" if every else what, sentence)
                break


def _maker(sentence: str, place: int) -> "Optional[str]":
    """What makes q so, where a sentence says it: "the rotary embedding casts query to ..."."""
    cast = _CASTS.search(sentence, 0, place)
    made = _about(sentence[: cast.start()], cast.start()) if cast else None
    return made if made in ("norm", "rope", "module", "kbit") else None


_CASTS = pattern(
    r"\b(?:up)?cast\w*|\bconvert\w*|\bturn\w*|\bpromot\w*|\bso\b|\btherefore\b|转|提升|所以|导致"
)


def _turned(sentence: str, place: int) -> bool:
    """Whether what is float32 at a place was half before, or became float32."""
    before = _HALF.search(sentence, 0, place)
    if before and _TURNED.search(sentence, before.end()):
        return True
    if re.search(r"\b(?:v|value\w*)\b[^.]{0,20}", sentence[place:]) and _HALF.search(
        sentence, place
    ):
        return True  # v beside it stayed half
    return _BECAME.search(sentence[max(place - 16, 0) : place]) is not None


def _works(sentence: str) -> Iterator[Says]:
    works = _WORKS.search(sentence) is not None and _NOT_WORKS.search(sentence) is None
    cured = _REMEDY.search(sentence) if works and _CURED.search(sentence) else None
    left_out = _LEFT_OUT.search(sentence)
    merged = _MERGED.search(sentence)
    if (
        works
        and merged
        and not _OTHER.search(sentence)
        and _WORKS.search(sentence[merged.end() :].partition(",")[0])
    ):
        yield Says("merged", "works", sentence)
    if works and left_out:
        subject = _nearest(sentence, left_out.end())
        behind = sentence[left_out.end() :]
        if (
            re.match(
                r"\s*(?:those|these|this|that|them|it(?! (?:works?|runs?|ran|trains?|goes|is|was|does|passes)\b))\b",
                behind,
            )
            or "这行" in sentence
        ):
            subject = None
        yield Says(subject or "that", "works without", sentence)
    elif works and _ALONE.search(sentence):
        yield Says("base", "works", sentence)
    elif (
        works
        and (with_ := _WITH.search(sentence))
        and (subject := _behind(sentence, with_.start()))
    ):
        yield Says(subject, "works with", sentence)
    elif cured:
        yield Says(cured.lastgroup or "", "works with", sentence)
    elif works:
        for subject in dict.fromkeys(match.lastgroup for match in _SUBJECT.finditer(sentence)):
            yield Says(subject or "", "works", sentence)
    only = _ONLY_WITH.search(sentence)
    if only and not works:
        after = _nearest(sentence, only.end())
        before = sentence[max(only.start() - 24, 0) : only.start()]
        if after and not _OTHER.search(before):
            yield Says(after, "fails with", sentence)


_OTHER = pattern(r"\b(?:sdpa|eager|flash\w*|fa2|attn\w*)\b")  # attention, which is given or taken


def _behind(sentence: str, place: int) -> "Optional[str]":
    """What could be a remedy, soon behind a place in a sentence."""
    match = _REMEDY.search(sentence, place, place + 70)
    return match.lastgroup if match else None


def _nearest(sentence: str, place: int) -> "Optional[str]":
    """What is spoken of nearest to a place, on either side."""
    best, gap = None, 60
    for match in _SUBJECT.finditer(sentence):
        away = match.start() - place if match.start() >= place else place - match.end()
        if abs(away) < gap:
            best, gap = match.lastgroup, abs(away)
    return best
