"""Reward functions as plugin authors write them: good ones, and each kind of bad one. Loaded by the grader's tests.

The bad ones misbehave for the completion "bad" only, unless their name says `always`.
"""

import asyncio
import ctypes
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rewards.types import RewardResult


@dataclass
class Helper:
    """Dataclasses look their module up by name while it is executed."""

    factor: float = 1.0


def length(problem, completion):
    return len(completion) * Helper().factor


def length_reversed(completion, problem, *, scale=1.0):
    return len(completion) * scale


def true_if_good(problem, completion):
    return completion == "good"


def skips_bad(problem, completion):
    return None if completion == "bad" else 1.0


def skips_all(problem, completion):
    return None


def result(problem, completion):
    return RewardResult(reward=0.25, status="unparsed", detail="looked odd")


def odd_results(problem, completion):
    import numpy

    return {
        "status": RewardResult(reward=1.0, status="fine"),  # type: ignore[arg-type]
        "numpy": RewardResult(reward=numpy.float32(0.5), detail="two\nlines"),  # type: ignore[arg-type]
        "bool": RewardResult(reward=True),
        "detail": RewardResult(reward=1.0, detail=7),  # type: ignore[arg-type]
        "none": RewardResult(reward=None),
    }[completion]


async def length_async(problem, completion):
    await asyncio.sleep(0)
    return len(completion)


async def batch_length_async(completions, **kwargs):
    await asyncio.sleep(0)
    return [len(completion) for completion in completions]


def answer_length(problem, completion):
    return len(problem.answer)


def pid(problem, completion):
    return os.getpid()


def has_torch_or_sympy(problem, completion):
    return float("torch" in sys.modules or "sympy" in sys.modules)


def hang(problem, completion):
    while completion == "bad":
        pass
    return 1.0


def hang_in_c(problem, completion):
    import re

    if completion == "bad":
        re.match(r"(a+)+$", "a" * 60 + "b")  # backtracks for ages, holding the interpreter's lock
    return 1.0


def sleep_always(problem, completion):
    time.sleep(60)


def exits(problem, completion):
    if completion == "bad":
        print("about to leave")
        os._exit(7)
    return 1.0


def exits_politely(problem, completion):
    if completion == "bad":
        sys.exit(3)
    return 1.0


def segfault(problem, completion):
    if completion == "bad":
        ctypes.string_at(0)
    return 1.0


def exits_always(problem, completion):
    os._exit(7)


def asks_32_threads(problem, completion):
    with ThreadPoolExecutor(32) as threads:
        return sum(threads.map(lambda _: time.sleep(0.01) or len(bytearray(1 << 16)) >> 16, range(64)))


def eats_memory(problem, completion):
    hoard = []
    while completion == "bad":
        hoard.append(bytearray(1 << 24))
    return 1.0


def raises(problem, completion):
    if completion == "bad":
        raise ValueError("no good:\nbad")
    return 1.0


def raises_always(problem, completion):
    raise KeyError("gold")


def raises_unprintable(problem, completion):
    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError("and again")

    if completion == "bad":
        raise Unprintable
    return 1.0


def returns_nan(problem, completion):
    return math.nan if completion == "bad" else 1.0


def returns_nan_always(problem, completion):
    return math.nan


def returns_text(problem, completion):
    return "1.0" if completion == "bad" else 1.0


def returns_list(problem, completion):
    return [1.0] if completion == "bad" else 1.0


def prints(problem, completion):
    print("x" * 5_000_000)
    print("y" * 5_000_000, file=sys.stderr)
    os.write(1, b"\x00\x00\x00\x02{}")
    return 1.0


def forks(problem, completion):
    """The child comes back from here too."""
    if completion == "bad" and os.fork() == 0:
        return 99.0
    return 1.0


def leaves_children(problem, completion):
    """Writes the numbers of the processes that it leaves behind into the file that the completion names."""
    child = subprocess.Popen(["sleep", "600"])
    Path(completion).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def call_of_batch(prompts, completions, completion_ids, nums, answer, **columns):
    """Says what it was called with, as numbers."""
    assert completion_ids is None or all(isinstance(ids, list) for ids in completion_ids)
    assert len(prompts) == len(completions) == len(nums) == len(answer) == len(completion_ids)
    assert "prompt" not in columns
    return [len(completions) * 100 + sum(ids) for ids in completion_ids]


def batch_of_messages(prompts, completions, **kwargs):
    assert all(prompt[0]["role"] == "user" for prompt in prompts)
    return [len(completion[0]["content"]) for completion in completions]


def batch_size(completions, **kwargs):
    return [len(completions)] * len(completions)


def batch_length(completions):
    return [float(len(completion)) for completion in completions]


def batch_array(completions, **kwargs):
    import numpy

    return numpy.array([len(completion) for completion in completions], dtype=numpy.float32)


def batch_generator(completions, **kwargs):
    yield from (len(completion) for completion in completions)


def batch_hang(completions, **kwargs):
    while "bad" in completions:
        pass
    return [1.0] * len(completions)


def batch_exits(completions, **kwargs):
    if "bad" in completions:
        os._exit(7)
    return [1.0] * len(completions)


def batch_raises(completions, **kwargs):
    return [{"good": 1.0}[completion] for completion in completions]


def batch_nan(completions, **kwargs):
    return [math.nan if completion == "bad" else 1.0 for completion in completions]


def batch_short(completions, **kwargs):
    return [1.0]


def batch_scalar(completions, **kwargs):
    return 1.0


def batch_none(completions, **kwargs):
    return None


def batch_needs_gold(completions, gold):
    return [1.0] * len(completions)


def extra_argument(problem, completion, tokenizer):
    return 1.0


def misnamed(prompt, text):
    return 1.0


class Judge:
    def __call__(self, problem, completion):
        return 1.0


not_a_function = 3


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """verl's."""
    return {"score": float(solution_str == ground_truth), "acc": True, "seen": f"{data_source} {extra_info}"}


def compute_score_lean(solution_str, ground_truth):
    return float(solution_str == ground_truth)


async def compute_score_async(data_source, solution_str, ground_truth, extra_info):
    assert data_source == "gsm8k"
    assert extra_info == {"split": "train"}
    return float(solution_str == ground_truth)


def compute_score_keyless(data_source, solution_str, ground_truth, extra_info):
    return {"acc": 1.0}


def reward_func(queries, prompts, labels):
    """OpenRLHF's."""
    assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts, strict=True))
    scores = [float(query.endswith(label)) for query, label in zip(queries, labels, strict=True)]
    return {"rewards": scores, "scores": scores, "extra_logs": {}}
