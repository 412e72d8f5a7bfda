"""A code dataset as people have it, written as a file of problems that a recipe can name: `grpo code-data`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import DatasetConfig
from grpo.data import DatasetError, read_rows
from rewards.code_datasets import LAYOUTS, read_code_problem
from rewards.code_problem import check_problem
from rewards.code_questions import read_question


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What became of the rows."""

    num_written: int
    """Problems in the file."""
    refused: list[str]
    """Of each row that is no problem, where it stands and why."""


def convert(source: DatasetConfig, layout: str, out: Path) -> Converted:
    """Write the rows of `source` that can be asked and tested, a JSON object with `id`, `prompt` and `tests` a line.

    The file appears when all of it is written. Raises DatasetError for data that cannot be read, an unknown layout, a
    file that cannot be written, or where no row is left.
    """
    assert source.path is not None
    if layout not in LAYOUTS:
        raise DatasetError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r} (--layout)")
    if out.suffix != ".jsonl":
        raise DatasetError(f"{out} must end in .jsonl, which is what is written")
    num_written, refused, part = 0, list[str](), out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            for problem in _problems(source, source.path, layout, refused):
                file.write(json.dumps(problem) + "\n")
                num_written += 1
        if not num_written:
            why = f"; the first: {refused[0]}" if refused else ""
            raise DatasetError(f"{source.path}: none of {len(refused)} rows is a problem of layout {layout}{why}")
        part.replace(out)
    except OSError as error:
        raise DatasetError(f"{out} cannot be written: {error}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return Converted(num_written=num_written, refused=refused)


def _problems(source: DatasetConfig, path: str, layout: str, refused: list[str]) -> Iterator[dict[str, Any]]:
    """Problems as they come; why a row is none is added to `refused`."""
    for number, row in read_rows(source, path):
        where = f"{path}:{number}"
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"a row must be an object, got {type(row).__name__}")
            tests = read_code_problem(row, layout)
            check_problem(tests)
            question = read_question(row, layout)
        except (ValueError, TypeError, SyntaxError) as error:  # a row is as its author left it
            refused.append(f"{where}: {error}")
            continue
        yield {"id": str(row.get("task_id", where)), "prompt": question, "tests": tests}
