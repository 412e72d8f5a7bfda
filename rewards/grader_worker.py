"""Calls reward functions; `python -m rewards.grader_worker` is one worker process of the grader.

Messages are JSON behind a length of four bytes, over an inherited socket: `{"load": [names], ...}` and jobs come in,
one reply for each call of a job goes out. What the functions print goes to the standard streams, which the parent set
to a pipe of their own. Imports no more than it needs: a worker starts in little more time than an empty interpreter,
and has torch or sympy in memory only if a reward imports them.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import inspect
import json
import math
import os
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, TypeVar

from rewards import registry
from rewards.registry import RewardFunction, RewardNotFoundError, RewardSignatureError
from rewards.types import STATUSES, Problem, RewardResult

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
Json = dict[str, Any]

HEADER: Final = struct.Struct(">I")
MAX_DETAIL: Final = 500
"""Longest detail of a result, in characters."""
ENVIRONMENT_MARK: Final = "GRPO_GRADER_WORKER"
"""Environment variable that is set in workers."""
_RESERVED: Final = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})


def pack(text: str) -> bytes:
    """JSON text (ASCII) as a message: its length in bytes, big-endian, then itself."""
    return HEADER.pack(len(text)) + text.encode("ascii")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a reward function raised."""

    detail: str
    """One line: the exception, and where in the author's file it was raised."""
    is_memory: bool
    """True if memory ran out, after which the process is not to be trusted with another call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedReward:
    """A reward function and how to call it."""

    function: RewardFunction
    """The function itself."""
    takes_one: bool
    """True for `f(problem, completion)`, False for TRL's kind."""
    accepts: frozenset[str] | None
    """Names of the keyword arguments that it takes; None: any."""
    required: tuple[str, ...]
    """Names of the arguments without a default."""


class Executor:
    """Loads reward functions by name and calls them; nothing that they raise gets past it."""

    def __init__(self) -> None:
        self._rewards: dict[str, LoadedReward] = {}
        self._runner: asyncio.Runner | None = None

    def load(self, names: Sequence[str]) -> Json:
        """`{"loaded": {name: {"takes_one", "takes_completion_ids"}}}`, or `{"refused": reason, "kind": error}`."""
        for name in names:
            if name in self._rewards:
                continue
            loaded, failure = _attempt(functools.partial(_load, name))
            if isinstance(failure, Failure):
                return {"refused": f"reward {name!r} cannot be imported: {failure.detail}", "kind": "GraderError"}
            if isinstance(loaded, LoadedReward):
                self._rewards[name] = loaded
            else:
                return {"refused": str(loaded), "kind": type(loaded).__name__}
        described = {
            name: {
                "takes_one": reward.takes_one,
                "takes_completion_ids": reward.accepts is None or "completion_ids" in reward.accepts,
            }
            for name, reward in self._rewards.items()
        }
        return {"loaded": described}

    def run(self, job: Json) -> Iterator[Json]:
        """One reply for each call of the job, in order.

        A reply is `{"scores": [[score, status, detail, is_fault], ...], "elapsed_s": ...}` with a row for each
        completion of the call, or `{"raised": detail, "retire": bool}`.
        """
        problems = [Problem(**fields) for fields in job["problems"]]
        for name, index, positions in job["calls"]:
            completions = [job["completions"][position] for position in positions]
            ids = job["completion_ids"] and [job["completion_ids"][position] for position in positions]
            started = time.perf_counter()
            scores, failure = _attempt(
                functools.partial(self._call, self._rewards[name], problems[index], completions, ids)
            )
            if failure is not None:
                yield {"raised": failure.detail, "retire": failure.is_memory}
            else:
                yield {"scores": scores, "elapsed_s": time.perf_counter() - started}

    def close(self) -> None:
        """Ends the event loop of the `async def` rewards."""
        if self._runner is not None:
            self._runner.close()

    def _call(
        self, reward: LoadedReward, problem: Problem, completions: list[str], ids: list[list[int]] | None
    ) -> list[Any]:
        if reward.takes_one:
            assert len(completions) == 1
            returned = self._wait(reward.function(problem=problem, completion=completions[0]))
            return [_read_score(returned)]
        returned = self._wait(reward.function(**_batch_arguments(reward, problem, completions, ids)))
        return _read_scores(returned, len(completions))

    def _wait(self, returned: Any) -> Any:
        """The value itself, or what it comes to when awaited, on one event loop for the life of the process."""
        if not inspect.isawaitable(returned):
            return returned
        import asyncio  # several times the start of a worker, and few rewards need it

        async def wait() -> Any:
            return await returned

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(wait())


def _attempt(action: Callable[[], T]) -> tuple[T, None] | tuple[None, Failure]:
    """The boundary between the grader and the code of others: the one place that catches everything."""
    try:
        return action(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001
        if isinstance(error, MemoryError):
            return None, Failure(detail="MemoryError: out of memory; see the grader's memory_mb", is_memory=True)
        return None, Failure(detail=_describe(error), is_memory=False)


def _describe(error: BaseException) -> str:
    """The last line of the traceback, with the innermost place in the file of the reward's author."""
    import traceback  # failures are rare

    text = "".join(traceback.format_exception_only(error))
    ours = {__file__, registry.__file__, importlib.__file__, str(Path(__file__).with_name("adapters.py"))}
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in ours and not frame.filename.startswith("<frozen ")
    ]
    place = ""
    if isinstance(error, SyntaxError) and not frames:
        text, place = f"{type(error).__name__}: {error.msg}", f" ({error.filename}:{error.lineno})"
    elif frames:
        innermost = [frame for frame in frames if frame.filename == frames[0].filename][-1]
        place = f" ({innermost.filename}:{innermost.lineno})"
    return _shorten(" ".join(text.split()), MAX_DETAIL - len(place)) + place


def _shorten(text: str, limit: int = MAX_DETAIL) -> str:
    return text if len(text) <= limit else text[: max(limit - 3, 0)] + "..."


def _load(name: str) -> LoadedReward | RewardNotFoundError | RewardSignatureError:
    try:
        function = registry.resolve_reward(name)
        takes_one = registry.takes_one_completion(function)
    except RewardNotFoundError as error:
        return error
    except RewardSignatureError as error:
        return RewardSignatureError(f"reward {name!r}: {error}")
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in named if p.default is p.empty)
    if takes_one and (extra := [name for name in required if name not in ("problem", "completion")]):
        return RewardSignatureError(
            f"reward {name!r}: takes (problem, completion) and asks for {extra[0]!r} too; "
            "give it a default, or read it from problem.columns"
        )
    return LoadedReward(
        function=function,
        takes_one=takes_one,
        accepts=None if takes_any else frozenset(p.name for p in named),
        required=required,
    )


def _batch_arguments(reward: LoadedReward, problem: Problem, completions: list[str], ids: Any) -> Json:
    """The keyword arguments of TRL: lists of one length, messages where the prompt is messages."""
    count = len(completions)
    columns = {name: value for name, value in problem.columns.items() if name not in _RESERVED}
    if problem.answer is not None:
        columns.setdefault("answer", problem.answer)
    arguments: Json = {name: [value] * count for name, value in columns.items()}
    arguments["prompts"] = [problem.prompt] * count
    arguments["completions"] = (
        completions
        if isinstance(problem.prompt, str)
        else [[{"role": "assistant", "content": completion}] for completion in completions]
    )
    if ids is not None:
        arguments["completion_ids"] = ids
    if missing := [name for name in reward.required if name not in arguments]:
        raise TypeError(
            f"the reward asks for {missing[0]!r}, which problem {problem.source or problem.id} does not have "
            f"(its columns: {', '.join(columns) or 'none'})"
        )
    if reward.accepts is None:
        return arguments
    return {name: value for name, value in arguments.items() if name in reward.accepts}


def _read_scores(returned: Any, count: int) -> list[Any]:
    if isinstance(returned, str | bytes | Mapping | AbstractSet) or not isinstance(returned, Iterable):
        return [_fault(f"returned {_name_type(returned)}, not a list of {count} numbers")] * count
    values = list(islice(returned, count + 1))
    if len(values) != count:
        number = f"more than {count}" if len(values) > count else str(len(values))
        return [_fault(f"returned {number} values for {count} completions")] * count
    return [_read_score(value) for value in values]


def _read_score(value: Any) -> list[Any]:
    """`[score or None, status, detail, is_fault]`."""
    if value is None:
        return [None, "ok", "", False]
    if isinstance(value, RewardResult):
        if value.status not in STATUSES:
            return _fault(f"returned a RewardResult of status {value.status!r}, not one of {', '.join(STATUSES)}")
        reward = None if value.reward is None else float(value.reward)
        return [reward, value.status, _shorten(" ".join(str(value.detail).split())), False]
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        return _fault(f"returned {_name_type(value)}, not a number")
    score = float(value)
    if not math.isfinite(score):
        return _fault(f"returned {score}, not a finite number")
    return [score, "ok", "", False]


def _fault(detail: str) -> list[Any]:
    return [0.0, "error", detail, True]


def _name_type(value: object) -> str:
    return "a number" if isinstance(value, int | float) else f"an object of type {type(value).__name__!r}"


def limit_memory(memory_mb: int | None) -> None:
    """Lets the process map `memory_mb` MiB beyond what it has mapped now; None: as much as it likes.

    What the rewards import is not counted: torch alone maps several GiB. Only the soft limit is set, so that a process
    that a reward starts may choose its own.
    """
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard
    if memory_mb is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft = mapped + memory_mb * 2**20
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def serve(channel: int, executor: Executor) -> None:
    """Answers messages from the socket until the parent closes it."""
    pid = os.getpid()
    while (message := _read_message(channel)) is not None:
        replies: Iterable[Json]
        if "load" in message:
            sys.path[:] = message["path"]
            limit_memory(None)
            replies = [executor.load(message["load"])]
            limit_memory(message["memory_mb"])
        else:
            replies = executor.run(message)
        for reply in replies:
            if os.getpid() != pid:
                os._exit(0)  # a reward forked, and its child came back as if it were the worker
            _write(channel, pack(json.dumps(reply)))


def _read_message(channel: int) -> Json | None:
    header = _read(channel, HEADER.size)
    if header is None:
        return None
    body = _read(channel, HEADER.unpack(header)[0])
    return None if body is None else json.loads(body)


def _read(channel: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        received = os.read(channel, min(size - len(data), 1 << 20))
        if not received:
            return None
        data += received
    return bytes(data)


def _write(channel: int, data: bytes) -> None:
    while data:
        data = data[os.write(channel, data) :]


def main() -> None:
    """Serves the socket of the first argument; the second is the reading end of a pipe that only the parent can write.

    When the parent ends, however it ends, the kernel closes the pipe and sends SIGIO to this process and to whatever it
    started, which ends them even in the middle of a call that holds the interpreter's lock.
    """
    channel, lifeline = (int(argument) for argument in sys.argv[1:3])
    for descriptor in (channel, lifeline):
        os.set_inheritable(descriptor, False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    executor = Executor()
    try:
        serve(channel, executor)
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    executor.close()


if __name__ == "__main__":
    main()
