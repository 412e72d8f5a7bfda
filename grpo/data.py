"""Problems from a generator, a local file or the hub, in an order that depends only on the seed.

Nothing here has a position to save: the problems of a step follow from the step's number.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from grpo.config import DatasetConfig
from grpo.countdown import Split, generate_problems, problem_text
from rewards import Problem

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DatasetError(Exception):
    """Data that cannot be used; the message names file, row and column."""


class Dataset:
    """Problems in an endless order, shuffled anew every epoch."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        if not problems:
            raise DatasetError("the dataset is empty; nothing can be asked")
        self.problems, self.seed = problems, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.problems)

    def take(self, start: int, count: int) -> list[Problem]:
        """Problems number `start` to `start + count` of the endless order."""
        return [self._at(index) for index in range(start, start + count)]

    def _at(self, index: int) -> Problem:
        epoch, place = divmod(index, len(self.problems))
        if self._order[0] != epoch:
            order = list(range(len(self.problems)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self.problems[self._order[1][place]]


def read_problems(config: DatasetConfig, *, seed: int, split: Split | Literal["all"], count: int) -> list[Problem]:
    """At most `count` problems of the training or the held-out part, or of a file's whole.

    Generated problems are split by a hash of the problem itself. A file's or hub dataset's held-out part is one row in
    eight, by its place, and the training never sees it.
    """
    if config.countdown is not None:
        assert split != "all"
        rows = itertools.islice(_distinct(generate_problems(config.countdown, seed, split), split), count)
        return [_countdown_problem(row, f"countdown:{split}:{index}") for index, row in enumerate(rows)]
    assert config.path is not None
    wanted = [
        (place, row)
        for place, row in enumerate(_read_rows(config, config.path))
        if split == "all" or (place % 8 == 7) == (split == "held_out")
    ]
    return [to_problem(row, config, f"{config.path}:{place + 1}") for place, row in wanted[:count]]


def to_problem(row: Mapping[str, Any], config: DatasetConfig, source: str) -> Problem:
    """One row of a dataset as a problem; a row with `nums` and `target` and no prompt is a countdown problem."""
    if config.prompt_column not in row and {"nums", "target"} <= row.keys():
        return _countdown_problem(row, source)
    prompt = row.get(config.prompt_column)
    if isinstance(prompt, list):
        if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt) or not prompt:
            raise DatasetError(
                f"{source}: column {config.prompt_column!r} must hold messages with 'role' and 'content'"
            )
    elif not isinstance(prompt, str) or not prompt.strip():
        raise DatasetError(
            f"{source}: column {config.prompt_column!r} must hold a question, got {prompt!r} "
            f"(columns: {', '.join(row)}; set dataset.prompt_column)"
        )
    answer = row.get(config.answer_column)
    return Problem(
        id=str(row.get("id", source)),
        prompt=prompt,
        reward=row.get("reward"),
        answer=None if answer is None else str(answer),
        tests=row.get("tests"),
        source=source,
        columns=dict(row),
    )


def _countdown_problem(row: Mapping[str, Any], source: str) -> Problem:
    nums, target = row["nums"], row["target"]
    if not isinstance(nums, list) or not nums or not all(isinstance(n, int) and not isinstance(n, bool) for n in nums):
        raise DatasetError(f"{source}: column 'nums' must be a list of whole numbers, got {nums!r}")
    if not isinstance(target, int) or isinstance(target, bool):
        raise DatasetError(f"{source}: column 'target' must be a whole number, got {target!r}")
    columns = {"nums": nums, "target": target}
    return Problem(id=source, prompt=problem_text(nums, target), answer=str(target), source=source, columns=columns)


def _distinct(rows: Iterator[dict[str, Any]], split: Split) -> Iterator[dict[str, Any]]:
    """Held-out problems without repeats; training may meet one again."""
    seen = set()
    for row in rows:
        key = (*sorted(row["nums"]), row["target"])
        if split == "train" or key not in seen:
            seen.add(key)
            yield row


def _read_rows(config: DatasetConfig, path: str) -> list[dict[str, Any]]:
    file = Path(path)
    if file.suffix in FORMATS:
        if not file.is_file():
            raise DatasetError(f"no dataset file {path!r} (looked from {Path.cwd()}; key dataset.path)")
        rows = list(_read_jsonl(file)) if file.suffix == ".jsonl" else _read_table(file)
    else:
        try:
            rows = list(datasets.load_dataset(path, config.config_name, split=config.split))
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{path!r} is neither a file ending in {', '.join(FORMATS)} nor a dataset that the hub gave: "
                f"{str(error).splitlines()[0]}"
            ) from None
    if not rows:
        raise DatasetError(f"{path} is empty; nothing can be asked")
    return rows[: config.num_problems * 2]


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """Line by line, so that a bad line can be named."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{file}:{number}: not valid JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise DatasetError(f"{file}:{number}: a row must be an object, got {type(row).__name__}")
            yield row


def _read_table(file: Path) -> list[dict[str, Any]]:
    try:
        table = datasets.load_dataset(FORMATS[file.suffix], data_files=str(file), split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DatasetError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    return list(table)
