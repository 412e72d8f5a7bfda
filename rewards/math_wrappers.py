"""What people put around an answer, taken off its text: dollars, emphasis, an introduction, a full stop."""

from __future__ import annotations

import re

_LEADING = re.compile(r"(?:[\s,;]|\\[,;:!]|\\quad)+")
_TRAILING = ("\\,", "\\;", "\\:", "\\!", "\\quad", "\\qquad", "\\")
_INTRODUCTION = re.compile(
    r"^(?:\\(?:text|mbox|textbf|mathrm)\s*\{)?\s*(?:the\s+)?(?:final\s+|correct\s+)?"
    r"(?:answer|result)\s*(?:is|:|=)\s*:?\s*\}?\s*",
    re.IGNORECASE,
)


def strip_wrappers(text: str) -> str:
    r"""Without `$`, `\(`, `\[`, `**`, code ticks and sentence punctuation around or between; a lone `$` stays, as a
    currency."""
    text = _INTRODUCTION.sub("", text.strip().strip("`").strip())
    for mark in ("**", "__", "*"):
        if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
            text = text[len(mark) : -len(mark)].strip()
    text = text.replace("\\\\(", "\\(").replace("\\\\[", "\\[")
    for mark in (
        r"\(",
        r"\)",
        r"\[",
        r"\]",
        "\\begin{align*}",
        "\\end{align*}",
        "\\begin{equation*}",
        "\\end{equation*}",
    ):
        if mark in text and not (mark == r"\[" and re.search(r"\\\\\[\d", text)):
            text = text.replace(mark, " ")
    dollars = len(re.findall(r"(?<!\\)\$", text))
    if dollars and dollars % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    previous = None
    while previous != text:
        previous = text
        text = text.strip()
        if not text.endswith(("...", "…", r"\ldots", r"\dots", r"\cdots")):
            leading = _LEADING.match(text)
            text = _strip_trailing(text[leading.end() :] if leading else text)
        for mark in ("**", "`", '"'):
            if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
                text = text[len(mark) : -len(mark)].strip()
        if text.startswith("{") and text.endswith("}") and _closes_at_end(text):
            text = text[1:-1].strip()
    return text


def _strip_trailing(text: str) -> str:
    """Without punctuation and LaTeX space at the end."""
    while True:
        shorter = text.rstrip(" \t\r\n.,;:")
        for mark in _TRAILING:
            shorter = shorter.removesuffix(mark)
        if shorter == text:
            return text
        text = shorter


def _closes_at_end(text: str) -> bool:
    depth = 0
    for i, c in enumerate(text):
        if c in "{}" and (i == 0 or text[i - 1] != "\\"):
            depth += 1 if c == "{" else -1
            if depth == 0 and i < len(text) - 1:
                return False
    return depth == 0
