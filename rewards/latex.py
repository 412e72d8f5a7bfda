"""From the text of an answer, LaTeX or plain, to tokens. Reads notation only: what a token means is the parser's
business.

One compiled pattern walks the text once, so the time is linear in its length.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise
from typing import NamedTuple

from rewards.math_notation import (
    DROPPED,
    FONTS,
    FUNCTIONS,
    PLAIN_NAMES,
    REPLACED,
    SAME,
    SHORT_WORDS,
    SPACES,
    SUBSCRIPT_RUN,
    SUBSCRIPTS,
    SUPERSCRIPT_RUN,
    SUPERSCRIPTS,
    TEXTS,
    TRANSPARENT,
)

MAX_ANSWER_CHARS = 4_000
"""A longer answer is not read as mathematics."""

_TOKEN = re.compile(
    r"(?P<space>[\s~]+)"
    r"|(?P<num>\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<cmd>\\[A-Za-z]+\*?|\\[^A-Za-z])"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<op>\*\*|<=|>=|!=|==|->|\.\.\.|.)",
    re.DOTALL,
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WORDY = re.compile(r"[A-Za-z]*[aeiouyAEIOUY][A-Za-z]*$")
_DIFFERENTIAL = re.compile(r"d[A-Zrstuvwxyz]$")


class Token(NamedTuple):
    """One piece of notation. `kind`: num, cmd, sym (one letter or a name), text (words), op, dots, end."""

    kind: str
    value: str
    spaced: bool = False
    """White space stands before it."""


def fold_unicode(text: str) -> str:
    """The text with unicode mathematics written in LaTeX and ASCII; control and bidirectional characters become spaces.

    A character that hides or reorders text must not glue two numbers together, so it is replaced, never removed.
    """
    if text.isascii():
        return text.replace("\x08oxed", r"\boxed").replace("\x0crac", r"\frac").replace("\x00", " ")
    text = text.replace("\x08oxed", r"\boxed").replace("\x0crac", r"\frac")
    text = SUPERSCRIPT_RUN.sub(lambda m: "^{" + "".join(SUPERSCRIPTS[c] for c in m.group()) + "}", text)
    text = SUBSCRIPT_RUN.sub(lambda m: "_{" + "".join(SUBSCRIPTS[c] for c in m.group()) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(REPLACED)).translate(REPLACED)
    return "".join(" " if unicodedata.category(c) in ("Cf", "Cc") and c not in "\t\n\r" else c for c in text)


def read_braced(text: str, start: int) -> int:
    """Index just past the brace group that opens at `start`, or -1 if it never closes. Linear; `\\{` does not count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        brace = match.group()
        if brace == "{":
            depth += 1
        elif brace == "}":
            depth -= 1
            if depth == 0:
                return match.end()
    return -1


def tokenize(text: str) -> list[Token]:
    """Tokens of one answer, spaces folded into `spaced`, thousands separators merged, wrappers without meaning
    dropped."""
    raw: list[Token] = []
    spaced = False
    position = 0
    end = len(text)
    while position < end:
        match = _TOKEN.match(text, position)
        assert match is not None
        position = match.end()
        kind, value = match.lastgroup or "op", match.group()
        if kind == "space":
            spaced = True
            continue
        if kind == "cmd":
            value = SAME.get(value, value)
            if value in SPACES:
                raw.append(Token("space", value, spaced))
                continue
            if value in DROPPED:
                spaced = True
                continue
            if value in TEXTS or value in FONTS:
                words, position = _read_group(text, position)
                raw.extend(_read_words(words, is_font=value in FONTS, spaced=spaced))
                spaced = False
                continue
            if value in TRANSPARENT:
                continue
            if value in (r"\%", r"\$", r"\#", r"\&", r"\_") or len(value) == 1:
                kind, value = "op", value[-1]
        elif kind == "word":
            raw.extend(_split_word(value, spaced))
            spaced = False
            continue
        elif kind == "op":
            value = {"**": "^", "<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "=", "->": r"\to"}.get(value, value)
            if value == "...":
                kind, value = "cmd", r"\ldots"
            elif value.startswith("\\"):
                kind = "cmd"
        raw.append(Token(kind, value, spaced))
        spaced = False
    return _merge_thousands(raw)


def _read_group(text: str, position: int) -> tuple[str, int]:
    """The text of the group, or of the single character, after a command; and where it ends."""
    while position < len(text) and text[position] == " ":
        position += 1
    if position < len(text) and text[position] == "{":
        end = read_braced(text, position)
        end = len(text) if end < 0 else end
        return text[position + 1 : end - 1], end
    return text[position : position + 1], position + 1


def _read_words(words: str, *, is_font: bool, spaced: bool) -> list[Token]:
    r"""Tokens of the inside of `\text{...}` or `\mathrm{...}`: mathematics where it is that, words otherwise."""
    stripped = words.strip()
    if not stripped:
        return []
    if len(stripped) == 3 and stripped[0] == "(" and stripped[1] in "ABCDEFGHIJ" and stripped[2] == ")":
        return [Token("sym", stripped[1], spaced)]
    if stripped in FUNCTIONS:
        return [Token("cmd", "\\" + stripped, spaced)]
    inner = tokenize(words.replace("$", " "))
    if is_font and stripped.isalpha() and len(stripped) > 1 and stripped.lower() not in SHORT_WORDS:
        return [Token("sym", stripped, spaced)]
    if inner and not is_font:
        # Letters inside \text are words, never factors; a lone letter is a name (\text{E}) or a unit (\text{ m}).
        inner = _join_text_letters(inner)
    return [inner[0]._replace(spaced=spaced or words[:1].isspace()), *inner[1:]] if inner else []


def _join_text_letters(tokens: list[Token]) -> list[Token]:
    out: list[Token] = []
    for token in tokens:
        is_letter = token.kind == "sym" and token.value.isalpha() and len(token.value) == 1
        if is_letter and out and out[-1].kind in ("textletters",) and not token.spaced:
            out[-1] = Token("textletters", out[-1].value + token.value, out[-1].spaced)
        else:
            out.append(Token("textletters", token.value, token.spaced) if is_letter else token)
    alone = len(out) == 1
    return [
        Token("sym" if alone and len(t.value) == 1 and not t.spaced else "text", t.value, t.spaced)
        if t.kind == "textletters"
        else t
        for t in out
    ]


def _split_word(word: str, spaced: bool) -> list[Token]:
    """A run of letters: a function, a name, a word, or one symbol a letter."""
    if len(word) == 1:
        return [Token("sym", word, spaced)]
    if word in FUNCTIONS or word.lower() in ("sin", "cos", "tan", "ln", "log", "sqrt", "exp"):
        return [Token("cmd", "\\" + (word if word in FUNCTIONS else word.lower()), spaced)]
    if word in PLAIN_NAMES:
        return [Token("cmd", "\\" + word, spaced)]
    lower = word.lower()
    if lower in ("infinity", "inf", "infty"):
        return [Token("cmd", r"\infty", spaced)]
    if lower in SHORT_WORDS or (
        len(word) >= 4 and (_WORDY.match(word) or word.isupper()) and not _is_alphabetical(word)
    ):
        return [Token("text", word, spaced)]
    if _DIFFERENTIAL.match(word):
        return [Token("sym", word, spaced)]
    if word == "sqrt" or (lower.endswith("pi") and len(word) == 3 and word[0].isalpha()):
        return [Token("sym", word[0], spaced), Token("cmd", r"\pi")]
    return [Token("sym", c, spaced and i == 0) for i, c in enumerate(word)]


def _is_alphabetical(word: str) -> bool:
    return all(a < b for a, b in pairwise(word)) and len(word) <= 5


def _merge_thousands(tokens: list[Token]) -> list[Token]:
    """Numbers with their separators joined (`1,000`, `1{,}000`, `1\\,000`, `1 000`); the space tokens dropped."""
    out: list[Token] = []
    mixed = _brackets_with_spaced_commas(tokens)
    brackets: list[int] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token.kind == "space":
            if i + 1 < len(tokens) and token.value != r"\!":
                tokens[i + 1] = tokens[i + 1]._replace(spaced=True)
            i += 1
            continue
        if token.value in ("(", "[", r"\{"):
            brackets.append(i)
        elif token.value in (")", "]", r"\}") and brackets:
            brackets.pop()
        if token.kind == "num" and len(token.value) <= 3 and "." not in token.value and token.value[0] != "0":
            digits, j = token.value, i + 1
            comma_joins = not brackets or brackets[-1] in mixed
            while (gap := _separator_length(tokens, j, comma_joins)) >= 0 and _is_three_digits(tokens, j + gap):
                following = tokens[j + gap].value
                digits += following
                j += gap + 1
                if "." in following:
                    break
            if j > i + 1:
                out.append(Token("num", digits, token.spaced))
                i = j
                continue
        out.append(token)
        i += 1
    return out


def _brackets_with_spaced_commas(tokens: list[Token]) -> frozenset[int]:
    """Opening brackets inside which some comma is followed by a space: there a tight comma belongs to a number."""
    found, stack = set(), []
    for i, token in enumerate(tokens):
        if token.value in ("(", "[", r"\{"):
            stack.append(i)
        elif token.value in (")", "]", r"\}") and stack:
            stack.pop()
        elif token.value == "," and stack and i + 1 < len(tokens) and tokens[i + 1].spaced:
            found.add(stack[-1])
    return frozenset(found)


def _separator_length(tokens: list[Token], i: int, plain_comma: bool) -> int:
    """How many tokens of thousands separator stand at i (0: white space alone; -1: none)."""
    values = [t.value for t in tokens[i : i + 4]]
    if values[:3] == ["{", ",", "}"]:
        return 4 if values[3:] == [r"\!"] else 3
    if values[:2] == [",", r"\!"]:
        return 2
    if values[:1] == [","]:
        return 1 if plain_comma and i + 1 < len(tokens) and not tokens[i + 1].spaced and not tokens[i].spaced else -1
    if values[:1] and values[0] in (r"\,", r"\ ", r"\!", r"\:", r"\;"):
        return 1
    return 0 if i < len(tokens) and tokens[i].spaced else -1


def _is_three_digits(tokens: list[Token], i: int) -> bool:
    return i < len(tokens) and tokens[i].kind == "num" and len(tokens[i].value.partition(".")[0]) == 3
