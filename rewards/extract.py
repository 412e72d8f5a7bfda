r"""Where in a completion the answer stands. Linear in the length: found from the end by string search, never by
backtracking.

The last statement counts: the last of a box, `<answer>`, `####` or "the answer is". Boxes joined in one statement are
a list.
Without a statement, the text itself if it is nothing but an answer, otherwise the last expression in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rewards.latex import read_braced
from rewards.math_units import is_known_unit

Source = Literal["box", "boxes", "answer tag", "####", "answer phrase", "whole text", "last expression"]

_TAIL_CHARS = 100_000
"""Phrases and expressions are looked for in this many characters from the end."""
_LAST_LINES = 12
_LINE_CHARS = 2_000
"""An expression without a statement is looked for in this many characters of each of the last lines."""
_MAX_JOINED_BOXES = 64
_MAX_EMPTY_BOXES = 16
_BOX = re.compile(r"(?:\\|\x08)?(?:boxed|fbox|framebox|oxed)\s*\{|\\(?:boxed|fbox)\s+(?=[^\s{])|\\boxed(?=\d)")
_JOINT = re.compile(
    r"(?:[\s,;:&$*_./|]|\\[,;:!()\[\]]|\\quad|\\qquad|\\ |~|\\text\s*\{|\}|\band\b|\bor\b|\bas well as\b"
    r"|\balso\b|\bpossibly\b|\bmaybe\b|\\(?:mathrm|mathbf)\s*\{|\\(?:lor|land|vee)|[A-Za-z]\w?(?:_\{?\w\}?)?\s*(?:=|\\in))*+$"
)
_PHRASE = re.compile(
    r"(?:\banswers?|\bcorrect\s+(?:option|choice)|\boption|\bsolutions?|\broots?|\bthe\s+values?)\b"
    r"(?:\s+(?:to|of|for)\s+(?:the|this|our|part)\s+\w+)?[\s*_]*"
    r"(?:\bis\s*:?|\bare\s*:?|\bwas\b|\bequals?\b|\bmust\s+be\b|\bshould\s+be\b|\bwill\s+be\b|:|=)[\s*_:]*",
    re.IGNORECASE,
)
_FINAL_HEADING = re.compile(r"^[ \t#*_]*(?:final[ \t]+)?answer[ \t*_:]*$", re.IGNORECASE | re.MULTILINE)
_STRONG = re.compile(r"\banswers?\b", re.IGNORECASE)
_NEGATED = re.compile(
    r"\b(?:not|isn't|isnt|never|cannot|can't|wrong|incorrect|neither|nor|unknown|unclear)\b", re.IGNORECASE
)
_FILLER = re.compile(
    r"^(?:indeed|therefore|thus|simply|just|clearly|equal to|given by|exactly|then|that|option|choice|likely)\b"
    r"[\s:,]*",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_RUN = re.compile(
    r"(?:\\[A-Za-z]+|[\d.,+\-*/^()=%$€£°²³√π∞{}\[\]_:!|<>≤≥±×·÷−½¼¾]|\s"
    r"|\b(?:or|and)\b|[A-Za-z](?=\s*[=<>^≤≥])(?<![A-Za-z][A-Za-z])|(?<=[\d)}^+\-*/=(])[A-Za-z](?![A-Za-z]))+"
)
_AFTER_RUN = re.compile(r"\s*(hundred|thousand|million|billion|trillion|dozen|percent|pct|degrees)\b", re.IGNORECASE)
_AFTER_VALUE = re.compile(r"\s|$|[.,;:!?*~)<”’\]]|[A-Za-z\\-]|\"(?!\))|'s\b")
_DENIED = re.compile(
    r"\b(?:not|isn't|isnt|never|cannot be|can't be|neither|nor|(?:more|less|fewer|greater|larger|smaller) than)\s+"
    r"(?:[A-Za-z]+\s+){0,2}$",
    re.IGNORECASE,
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_HEDGE = re.compile(r"\s*(?:,\s*)?(?:or|and)\s+(?:(?:possibly|maybe|perhaps|also|even)\s+)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Extraction:
    """The text of the answer and where it was found."""

    text: str
    source: Source


def extract_answer(completion: str) -> Extraction | None:
    """The answer's text in a completion, or None if it states none.

    Only the text after the last `</think>` counts where a `<think>` was opened; a thought that never ends states
    nothing.
    """
    text = after_thoughts(completion)
    found = extract_statement(text) or _without_statement(text)
    return found if found is not None and found.text.strip() else None


def after_thoughts(completion: str) -> str:
    """The text that follows the last thought."""
    close = completion.rfind("</think>")
    last_open = completion.rfind("<think>")
    if last_open > close:
        # An unfinished thought: what stands before it, after the thought before that.
        return completion[close + len("</think>") if close >= 0 else 0 : last_open]
    if close < 0:
        return completion
    tail = completion[close + len("</think>") :]
    if last_open >= 0:
        return tail
    return tail if tail.strip() else completion[:close]


def extract_statement(text: str) -> Extraction | None:
    """The last explicit statement of an answer, or None. One that is cut off (`\\boxed{4`) is a statement of
    nothing."""
    found: list[tuple[int, Extraction]] = []
    box = _last_box(text)
    if box is not None:
        found.append(box)
    tag = _last_tag(text)
    if tag is not None:
        found.append(tag)
    hashes = text.rfind("####")
    if hashes >= 0:
        line = text[hashes + 4 :].lstrip("#").strip().split("\n", 1)[0]
        if line.strip():
            found.append((hashes, Extraction(line.strip(), "####")))
    if not found:
        return _last_phrase(text, -1, strong_only=False)
    position, statement = max(found, key=lambda item: item[0])
    return _last_phrase(text, position, strong_only=True) or statement


# Boxes


def _last_box(text: str) -> tuple[int, Extraction] | None:
    """Position and content of the last box that is not empty, or that never closes. Joined boxes are a list."""
    end = len(text)
    for _ in range(_MAX_EMPTY_BOXES):
        box = _box_before(text, end)
        if box is None:
            return None
        start, stop, content = box
        if content is None:
            return start, Extraction("", "box")
        if content.strip(" \t\n$.?_~\\") and content.strip().lower() not in ("answer", "...", r"\ldots", "your answer"):
            break
        end = start
    else:
        return None
    contents = [content]
    first = start
    while len(contents) < _MAX_JOINED_BOXES:
        earlier = _box_before(text, first)
        if earlier is None or earlier[2] is None or earlier[1] > first or first - earlier[1] > 60:
            break
        if not _JOINT.match(text[earlier[1] : first]) or _ends_sentence(text[earlier[1] : first]):
            break
        contents.insert(0, earlier[2])
        first = earlier[0]
    distinct = list(dict.fromkeys(c.strip() for c in contents))
    if len(distinct) > 1:
        return start, Extraction(", ".join(distinct), "boxes")
    return start, Extraction(_follow_unit(distinct[0], text[stop : stop + 12]), "box")


def _ends_sentence(between: str) -> bool:
    return re.search(r"\.\s*\$?\s*(?:\n|$)|\.\s+[A-Z]", between) is not None


def _follow_unit(content: str, after: str) -> str:
    r"""`\boxed{28} \%` and `\boxed{28}$ percent` say percent."""
    match = re.match(r"\s*\$?\s*(\\?%|percent\b|pct\b|\^\\circ|\^\{\\circ\})", after)
    return content if match is None or "%" in content else content + (r"^\circ" if "circ" in match[1] else r"\%")


def _box_before(text: str, end: int) -> tuple[int, int, str | None] | None:
    """The last box that starts before `end`: its start, its end, its content (None if it does not close)."""
    at = end
    for _ in range(8):
        at = max(
            text.rfind("boxed", 0, at),
            text.rfind("fbox", 0, at),
            text.rfind("framebox", 0, at),
            text.rfind("\x08oxed", 0, at),
        )
        if at < 0:
            return None
        start = at - 1 if at and text[at - 1] == "\\" else at
        match = _BOX.match(text, start)
        if match is not None and (text[start] in "\\\x08" or match.group().endswith("{")):
            break
    else:
        return None
    if not match.group().endswith("{"):
        token = re.match(r"\\[A-Za-z]+(?:\{[^{}]*\})*|[^\s$.,;]+", text[match.end() : match.end() + 200])
        content = token.group() if token else ""
        return start, match.end() + len(content), content
    stop = read_braced(text, match.end() - 1)
    if stop < 0:
        return start, len(text), None
    return start, stop, text[match.end() : stop - 1]


def _last_tag(text: str) -> tuple[int, Extraction] | None:
    start = text.rfind("<answer>")
    if start < 0:
        return None
    close = text.find("</answer>", start)
    inside = text[start + len("<answer>") : close if close >= 0 else len(text)].strip()
    # A box or a phrase inside the tag is found by itself: it stands later in the text.
    return start, Extraction(inside, "answer tag")


# Phrases


def _last_phrase(text: str, after: int, *, strong_only: bool) -> Extraction | None:
    """The last "the answer is ..." with a value, if it stands after position `after`."""
    offset = max(0, len(text) - _TAIL_CHARS, after + 1 if after >= 0 else 0)
    if after >= 0:
        # The rest of the statement found so far (the box itself, the closing tag) is no phrase.
        offset = max(offset, after + 1)
    tail = text[offset:]
    matches = [*_PHRASE.finditer(tail), *_FINAL_HEADING.finditer(tail)]
    matches.sort(key=lambda m: m.start())
    for match in reversed(matches[-16:]):
        if strong_only and not _STRONG.search(match.group()):
            continue
        content = _statement_after(tail[match.end() : match.end() + 2000])
        if not content or "boxed" in content or _NEGATED.search(content):
            continue
        if strong_only:
            if _looks_like_value(content):
                return Extraction(content, "answer phrase")
            continue
        if _looks_like_value(content) or len(content.split()) <= 4:
            return Extraction(content, "answer phrase")
        inner = _last_expression(content)
        if inner is not None:
            return Extraction(inner, "answer phrase")
    return None


def _statement_after(text: str) -> str:
    """The rest of the sentence, math that spans lines included."""
    text = text.lstrip(" \t\n*_:")
    for opener, closer in (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("\\begin", "\\end")):
        if text.startswith(opener):
            stop = text.find(closer, len(opener))
            if stop >= 0:
                line_end = text.find("\n", stop)
                rest = text[: line_end if line_end >= 0 else len(text)]
                return _cut_sentence(rest, stop + len(closer))
    line = text.split("\n", 1)[0].split("<|", 1)[0]
    return _cut_sentence(line, 0)


def _cut_sentence(line: str, start: int) -> str:
    in_math = False
    for match in re.finditer(r"\$|[.!?](?=\s+[A-Z\\$(*]|\s*$|\s*\*\*)", line[start:]):
        if match.group() == "$":
            in_math = not in_math
        elif not in_math or line[start + match.start() + 1 :].count("$") == 0:
            line = line[: start + match.start()]
            break
    previous = None
    while previous != line:
        previous = line
        line = _FILLER.sub("", line.strip().strip("*_").strip())
    return line


def _looks_like_value(content: str) -> bool:
    """Whether the text is an answer and nothing else: mathematics, or mathematics with a unit."""
    from rewards.math_answer import read_answer
    from rewards.math_ast import Text

    return len(content) <= 500 and not isinstance(read_answer(content).node, Text)


# Without a statement


def _without_statement(text: str) -> Extraction | None:
    from rewards.math_answer import read_answer
    from rewards.math_ast import Text

    stripped = text.strip()
    if not stripped:
        return None
    is_one_piece = "\n" not in stripped or stripped.startswith(("$", "\\[", "\\(", "\\begin"))
    if len(stripped) <= 1000 and is_one_piece:
        reading = read_answer(stripped)
        if not isinstance(reading.node, Text) or (len(stripped.split()) <= 4 and not re.search(r"\d", stripped)):
            return Extraction(stripped, "whole text")
    lines = [line for line in stripped[-_TAIL_CHARS:].split("\n") if line.strip()]
    for line in reversed(lines[-_LAST_LINES:]):
        found = _last_expression(line[-_LINE_CHARS:])
        if found is not None:
            return Extraction(found, "last expression")
    block = _MATH.findall(stripped[-_LINE_CHARS:])
    if block:
        return Extraction(next(part for part in block[-1] if part), "last expression")
    if len(stripped) <= 200 and "\n" not in stripped:
        return Extraction(stripped, "whole text")
    return None


def _last_expression(line: str) -> str | None:
    """The last formula of a line, or the last run of digits and signs; several joined by "or" or "and" together."""
    line = _CALCULATOR.sub("", line.split("<|", 1)[0])
    pieces: list[tuple[int, int, str]] = [
        (m.start(), m.end(), next(g for g in m.groups() if g)) for m in _MATH.finditer(line)
    ]
    covered = [(start, end) for start, end, _ in pieces]
    blanked = line
    for start, end in covered:
        blanked = blanked[:start] + "~" * (end - start) + blanked[end:]
    for run in _RUN.finditer(blanked):
        value = re.sub(r"^(?:\s|\b(?:or|and)\b|[,.;:)])+|(?:\s|\b(?:or|and)\b|[,.;:(=])+$", "", run.group())
        if re.search(r"[\dπ∞]|\\(?:frac|sqrt|pi|infty)", value):
            start = run.start() + run.group().find(value)
            if not _stands_alone(blanked, start, start + len(value)):
                value = ""
            scale = _AFTER_RUN.match(blanked, start + len(value))
            if scale:
                value += " " + scale[1]
            elif unit := _unit_after(blanked[start + len(value) :]):
                value += " " + unit
            pieces.append((start, start + len(value), value))
    if not pieces:
        return None
    pieces.sort()
    if not pieces[-1][2]:
        return None
    chosen = [pieces[-1]]
    for piece in reversed(pieces[:-1]):
        if not _HEDGE.fullmatch(line[piece[1] : chosen[0][0]]) and line[piece[1] : chosen[0][0]].strip() not in (
            ",",
            ";",
        ):
            break
        chosen.insert(0, piece)
    return ", ".join(value.strip() for _, _, value in chosen)


def _unit_after(text: str) -> str:
    """The unit that the next words are (`km`, `square meters`), or nothing: of other words only the number is meant."""
    words = re.match(r"\s*((?:(?:square|cubic)\s+)?[A-Za-z]+)", text)
    return words[1] if words and is_known_unit(words[1]) else ""


def _stands_alone(line: str, start: int, end: int) -> bool:
    """Whether a run is a value in prose: not denied, and not cut out of code or of other notation."""
    if _DENIED.search(line[max(0, start - 60) : start]):
        return False
    before = line[start - 1 : start]
    return (not before or before in ' \t(*"“‘>~#\\' or before.isalpha()) and _AFTER_VALUE.match(line, end) is not None


def closed_boxes(completion: str) -> list[str]:
    """Contents of the last boxes of the text after the thoughts, latest first; one that does not close ends the
    search."""
    text = after_thoughts(completion)
    contents: list[str] = []
    end = len(text)
    while len(contents) < _MAX_JOINED_BOXES and (box := _box_before(text, end)) is not None and box[2] is not None:
        contents.append(box[2])
        end = box[0]
    return contents
