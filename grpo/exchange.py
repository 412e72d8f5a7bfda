"""Groups on their way between ranks: flat arrays of tokens, log-probabilities, experts and texts, JSON for the rest.

A rank unpacks bytes, never objects: nothing that arrives can be more than numbers and text. Problems do not travel, as
all ranks hold the questions of a round. Everything comes out as it went in, to the bit.

Shapes: P prompt tokens of all groups, T tokens of all completions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, overload

import numpy as np

from grpo.distributed import Ranks
from grpo.types import Group
from rewards import Problem, RewardResult
from rollouts import Completion

ALIGNMENT = 8
"""Bytes; the arrays begin at a multiple."""


def gather_groups(own: Sequence[Group], problems: Sequence[Problem], ranks: Ranks) -> list[Group]:
    """The groups of all ranks, which `Ranks.share` dealt `problems` out to, in order and on every rank."""
    if ranks.size == 1:
        return list(own)
    groups = list[Group]()
    for rank, data in enumerate(ranks.gather_bytes(pack_groups(own))):
        first = len(groups)
        groups += own if rank == ranks.rank else unpack_groups(data, problems[first:])
    return groups


def pack_groups(groups: Sequence[Group]) -> bytes:
    """Groups as bytes, their problems aside."""
    completions = [completion for group in groups for completion in group.completions]
    tokens_P = _flat([group.prompt_ids for group in groups], np.int32)
    tokens_T = _flat([completion.token_ids for completion in completions], np.int32)
    logprobs_T = _flat([completion.logprobs for completion in completions], np.float64)
    if np.array_equal(logprobs_T, narrow_T := logprobs_T.astype(np.float32), equal_nan=True):
        logprobs_T = narrow_T
    experts = _Experts()
    texts = [[text.encode("utf-8", "surrogatepass") for text in group.texts] for group in groups]
    header = {
        "logprobs": str(logprobs_T.dtype),
        "prompts": [len(group.prompt_ids) for group in groups],
        "completions": [
            [
                [
                    len(completion.token_ids),
                    completion.finish_reason,
                    completion.policy_version,
                    experts.place(completion.experts_MTK),
                    experts.place(completion.prompt_experts_MSK),
                ]
                for completion in group.completions
            ]
            for group in groups
        ],
        "texts": [[len(text) for text in texts_of_group] for texts_of_group in texts],
        "results": [[_result_to_row(result) for result in group.results] for group in groups],
        "experts": [[str(array.dtype), *array.shape] for array in experts.arrays],
    }
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % ALIGNMENT)
    # What takes most bytes an item comes first, so that all are aligned.
    arrays = [logprobs_T, tokens_P, tokens_T, *experts.arrays]
    flat = (array.tobytes() for array in arrays)
    return b"".join([np.int64(len(written)).tobytes(), written, *flat, *chain.from_iterable(texts)])


def unpack_groups(data: bytes, problems: Sequence[Problem]) -> list[Group]:
    """What `pack_groups` was given, of the first of these problems."""
    size = int(np.frombuffer(data, np.int64, count=1)[0])
    header = json.loads(data[ALIGNMENT : ALIGNMENT + size])
    reader = _Reader(data, ALIGNMENT + size)
    counts = [[row[0] for row in rows] for rows in header["completions"]]
    logprobs = reader.take_parts(header["logprobs"], list(chain.from_iterable(counts)))
    prompts = reader.take_parts("int32", header["prompts"])
    tokens = reader.take_parts("int32", list(chain.from_iterable(counts)))
    arrays = [reader.take(dtype, math.prod(shape)).reshape(shape).copy() for dtype, *shape in header["experts"]]
    return [
        Group(
            problem=problem,
            prompt_ids=next(prompts),
            completions=[
                Completion(
                    token_ids=next(tokens),
                    logprobs=next(logprobs),
                    finish_reason=reason,
                    policy_version=version,
                    experts_MTK=None if own is None else arrays[own],
                    prompt_experts_MSK=None if of_prompt is None else arrays[of_prompt],
                )
                for _, reason, version, own, of_prompt in rows
            ],
            texts=[reader.take_text(length) for length in texts],
            results=[_read_result(row) for row in results],
        )
        for problem, rows, texts, results in zip(
            problems, header["completions"], header["texts"], header["results"], strict=False
        )
    ]


class Numbers(Sequence[Any]):
    """Numbers as they came, which become Python's own when they are read: most ranks never read most of them."""

    __slots__ = ("_array",)

    def __init__(self, array: np.ndarray) -> None:
        self._array = array.copy()  # not a view: one completion that is kept would keep all of its message

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, place: int) -> Any: ...

    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...

    def __getitem__(self, place: int | slice) -> Any:
        return self._array[place].tolist()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._array.tolist())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (list, Numbers)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def __repr__(self) -> str:
        return repr(list(self))


class _Experts:
    """Arrays of experts, each once: those of a prompt belong to all completions of its group."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self._places: dict[int, int] = {}

    def place(self, array: np.ndarray | None) -> int | None:
        """Where the array stands among all; None for none."""
        if array is None:
            return None
        if id(array) not in self._places:
            self._places[id(array)] = len(self.arrays)
            self.arrays.append(array)
        return self._places[id(array)]


class _Reader:
    """Arrays one after another out of bytes."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._at = data, start

    def take(self, dtype: str, count: int) -> np.ndarray:
        """The next array; read-only, in the memory of the bytes."""
        array = np.frombuffer(self._data, dtype, count, self._at)
        self._at += array.nbytes
        return array

    def take_parts(self, dtype: str, counts: Sequence[int]) -> Iterator[Numbers]:
        """The next array, in parts of so many numbers each."""
        numbers, ends = self.take(dtype, sum(counts)), accumulate(counts)
        return (Numbers(numbers[end - count : end]) for count, end in zip(counts, ends, strict=True))

    def take_text(self, size: int) -> str:
        """So many bytes of text."""
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-8", "surrogatepass")


def _flat(lists: Sequence[Sequence[float]], dtype: type[np.generic]) -> np.ndarray:
    """Numbers of all lists, one after another."""
    return np.fromiter(chain.from_iterable(lists), dtype, count=sum(map(len, lists)))


def _result_to_row(result: RewardResult) -> list[Any]:
    return [result.reward, dict(result.breakdown), result.status, result.detail, result.elapsed_s]


def _read_result(row: Sequence[Any]) -> RewardResult:
    reward, breakdown, status, detail, elapsed_s = row
    return RewardResult(reward=reward, breakdown=breakdown, status=status, detail=detail, elapsed_s=elapsed_s)
