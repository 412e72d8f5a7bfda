"""Problems from a generator, a local file or the hub, in an order that depends only on the seed.

Nothing here has a position to save: `grpo/stream.py` holds it.
"""

from __future__ import annotations

import itertools
import json
import random
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from grpo.config import DatasetConfig
from grpo.countdown import MAX_MISSES, Split, generate_problems, problem_text
from rewards import Problem

ROWS_PER_HELD_OUT = 8
"""One row of a file or hub dataset in so many is held out where no `evaluation.path` is given."""
HUB_TIMEOUT_S = 5.0
"""Seconds that the hub has to answer before it counts as out of reach."""


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
        return [self.problems[place] for place in self.places(start, count)]

    def places(self, start: int, count: int) -> list[int]:
        """Where these stand in `problems`."""
        return [self._place_of(index) for index in range(start, start + count)]

    def _place_of(self, index: int) -> int:
        epoch, place = divmod(index, len(self.problems))
        if self._order[0] != epoch:
            order = list(range(len(self.problems)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][place]


def read_problems(config: DatasetConfig, *, seed: int, split: Split | Literal["all"], count: int) -> list[Problem]:
    """At most `count` problems of the training or the held-out part, or of a file's whole.

    Generated problems are split by a hash of the problem itself. A file's or hub dataset's held-out part is one row in
    eight, by its place, and the training never sees it. Raises DatasetError for data that is not there, cannot be read
    or holds no such problem.
    """
    if config.countdown is not None:
        assert split != "all"
        rows = generate_problems(config.countdown, seed, split)
        # Held-out problems are counted once each; training may meet one again.
        rows = _distinct(rows, count) if split == "held_out" else itertools.islice(rows, count)
        return [_countdown_problem(row, f"countdown:{split}:{index}") for index, row in enumerate(rows)]
    assert config.path is not None
    place = -1
    problems: list[Problem] = []
    for place, (row_number, row) in enumerate(read_rows(config, config.path)):
        if split == "all" or (place % ROWS_PER_HELD_OUT == ROWS_PER_HELD_OUT - 1) == (split == "held_out"):
            problems.append(to_problem(row, config, f"{config.path}:{row_number}"))
            if len(problems) == count:
                break
    if not problems:
        raise DatasetError(_nothing_in(config.path, place + 1, split))
    return problems


def to_problem(row: Mapping[str, Any], config: DatasetConfig, source: str) -> Problem:
    """One row of a dataset as a problem; a row with `nums` and `target` and no prompt is a countdown problem."""
    if not isinstance(row, Mapping):
        raise DatasetError(f"{source}: a row must be an object, got {type(row).__name__}")
    if config.prompt_column not in row and {"nums", "target"} <= row.keys():
        return _countdown_problem(row, source)
    prompt = row.get(config.prompt_column)
    if isinstance(prompt, list):
        if not prompt or not all(map(_is_message, prompt)):
            raise DatasetError(
                f"{source}: column {config.prompt_column!r} must hold messages with 'role' and 'content'"
            )
    elif not isinstance(prompt, str) or not prompt.strip():
        raise DatasetError(
            f"{source}: column {config.prompt_column!r} must hold a question, got {prompt!r} "
            f"(columns: {', '.join(row)}; set dataset.prompt_column)"
        )
    answer, reward = row.get(config.answer_column), row.get("reward")
    if reward is not None and not isinstance(reward, str):
        raise DatasetError(f"{source}: column 'reward' must name a reward function, got {reward!r}; rename the column")
    return Problem(
        id=str(row.get("id", source)),
        prompt=prompt,
        reward=reward,
        answer=None if answer is None else str(answer),
        tests=row.get("tests"),
        source=source,
        columns=dict(row),
    )


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _countdown_problem(row: Mapping[str, Any], source: str) -> Problem:
    nums, target = row["nums"], row["target"]
    if not isinstance(nums, list) or not nums or not all(isinstance(n, int) and not isinstance(n, bool) for n in nums):
        raise DatasetError(f"{source}: column 'nums' must be a list of whole numbers, got {nums!r}")
    if not isinstance(target, int) or isinstance(target, bool):
        raise DatasetError(f"{source}: column 'target' must be a whole number, got {target!r}")
    columns = {"nums": nums, "target": target}
    return Problem(id=source, prompt=problem_text(nums, target), answer=str(target), source=source, columns=columns)


def _nothing_in(path: str, num_rows: int, split: str) -> str:
    if num_rows == 0:
        return f"{path} is empty; nothing can be asked"
    return (
        f"{path} has {num_rows} rows, and none for the {split} part (one row in {ROWS_PER_HELD_OUT} is held out); "
        "give evaluation.path, or set evaluation.num_problems=0"
    )


def _distinct(rows: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """The first `count` rows that are not the same numbers and target in another order."""
    seen = set[tuple[int, ...]]()
    misses = 0
    while len(seen) < count:
        row = next(rows)
        key = (*sorted(row["nums"]), row["target"])
        misses = misses + 1 if key in seen else 0
        if misses == MAX_MISSES:
            raise DatasetError(
                f"dataset.countdown has about {len(seen)} different problems to hold out, {count} are asked for; "
                f"widen its range, or set evaluation.num_problems={len(seen)}"
            )
        if not misses:
            seen.add(key)
            yield row


def read_rows(config: DatasetConfig, path: str) -> Iterator[tuple[int, Any]]:
    """Rows as they come, each with its number from 1: the line of a .jsonl file, the place elsewhere.

    Raises DatasetError for a file or hub dataset that is not there or cannot be read.
    """
    file = Path(path)
    if file.suffix in FORMATS or file.exists() or path.startswith(("/", ".", "~")):
        if file.suffix not in FORMATS:
            raise DatasetError(f"dataset file {path!r} must end in {', '.join(FORMATS)} (key dataset.path)")
        if not file.is_file():
            raise DatasetError(f"no dataset file {path!r} (looked from {Path.cwd()}; key dataset.path)")
        try:
            yield from FORMATS[file.suffix](file)
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{file} cannot be read: {error}") from None
    else:
        yield from enumerate(_read_hub(config, path), start=1)


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """Line by line, so that a bad line can be named."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DatasetError(f"{file}:{number}: not valid JSON: {error.msg}") from None


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{file}:{error.lineno}: not valid JSON: {error.msg} (a row a line? name it .jsonl)"
        ) from None
    if not isinstance(rows, list):
        raise DatasetError(f"{file} must hold a list of rows, got {type(rows).__name__}")
    yield from enumerate(rows, start=1)


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    # Imported where it is needed: it takes seconds, and generated problems and JSON do without.
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            if "corresponds to no data" in str(error):  # how a file of no rows is put
                return
            raise DatasetError(f"{file} cannot be read as parquet: {_first_line(error)}") from None
        yield from enumerate(table, start=1)


def _read_hub(config: DatasetConfig, path: str) -> Iterator[Any]:
    import datasets

    if not datasets.config.HF_HUB_OFFLINE and (fault := _hub_fault(datasets.config.HF_ENDPOINT)):
        raise DatasetError(
            f"{path!r} is no file ending in {', '.join(FORMATS)}, and the hub cannot be reached ({fault}); "
            "correct dataset.path, or set HF_HUB_OFFLINE=1 to use a copy that was downloaded before"
        )
    try:
        yield from datasets.load_dataset(path, config.config_name, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DatasetError(
            f"{path!r} is neither a file ending in {', '.join(FORMATS)} nor a dataset that the hub gave: "
            f"{_first_line(error)} (keys dataset.path, dataset.config_name, dataset.split)"
        ) from None


def _hub_fault(endpoint: str) -> str | None:
    """Why the hub does not answer, asked once: `datasets` would try for half a minute before it says so."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except OSError as error:
        reason = getattr(error, "reason", error)
        # Other certificates than ours may be known to the client that downloads.
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error  # `datasets` hides the reason behind "an error occurred"
    return (str(cause).splitlines() or [type(cause).__name__])[0]


FORMATS: Mapping[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""How a local file is read, by its ending."""
