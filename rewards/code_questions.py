"""What a row of a code dataset asks for, as text for a model; `code_datasets` reads the tests of the same rows.

Every question ends with the form that the reward reads: one program in a fenced block. Of MBPP's tests the first is
shown, since it alone says what the function is called; the others stay hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]

FORM = "Answer with the whole program, its imports too, in one fenced block that begins with ```python."
INPUT_AND_OUTPUT = "It reads from standard input and prints to standard output."


def read_question(row: Row, layout: str) -> str:
    """The question of a row. ValueError for an unknown layout, or a row without a question."""
    reader = QUESTIONS.get(layout)
    if reader is None:
        raise ValueError(f"layout must be one of {', '.join(QUESTIONS)}, got {layout!r}")
    try:
        text = reader(row)
    except KeyError as error:
        raise ValueError(f"a row of layout {layout} needs {error}; this one has {', '.join(map(str, row))}") from error
    if not text.strip():
        raise ValueError(f"a row of layout {layout} asks nothing")
    return text


def _humaneval(row: Row) -> str:
    return f"Complete this function.\n\n```python\n{row['prompt'].strip()}\n```\n\n{FORM}"


def _mbpp(row: Row) -> str:
    task = row["text"] if "text" in row else row["prompt"]  # `prompt` in the sanitized part
    if not row["test_list"]:
        raise ValueError("an mbpp row has an empty test_list")
    return f"{task.strip()}\n\nYour code should pass tests like this one:\n\n{row['test_list'][0].strip()}\n\n{FORM}"


def _apps(row: Row) -> str:
    return _with_starter(row["question"], row.get("starter_code"))


def _livecodebench(row: Row) -> str:
    return _with_starter(row["question_content"], row.get("starter_code"))


def _open_r1(row: Row) -> str:
    return _with_starter(row["problem_statement"] if "problem_statement" in row else row["prompt"], None)


def _prime(row: Row) -> str:
    prompt = row["prompt"]
    asked = prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt if m["role"] == "user")
    return f"{asked.strip()}\n\n{FORM}" if asked.strip() else ""


def _with_starter(question: str, starter: str | None) -> str:
    """A question that gives the head of a function is about that; one that does not is about input and output."""
    if not question.strip():
        return ""
    if starter and starter.strip():
        return f"{question.strip()}\n\nBegin with:\n\n```python\n{starter.strip()}\n```\n\n{FORM}"
    return f"{question.strip()}\n\n{INPUT_AND_OUTPUT} {FORM}"


QUESTIONS: Mapping[str, Callable[[Row], str]] = {
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "apps": _apps,
    "livecodebench": _livecodebench,
    "open_r1": _open_r1,
    "prime": _prime,
}
"""By the layouts of `code_datasets`."""
