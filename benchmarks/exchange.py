"""What it takes to have all completions of a step on every rank: bytes sent by each, milliseconds of the slowest.

Each rank has its share of `--completions`, of `--tokens` tokens each; with `--experts LAYERS EACH` also the experts
that the tokens went to. The fastest of some rounds, and their median.

    accelerate launch --config_file recipes/accelerate/cpu.yaml --num_processes 2 benchmarks/exchange.py
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

sys.path[0] = str(Path(__file__).parents[1])

from grpo.distributed import Ranks  # noqa: E402
from grpo.exchange import gather_groups, pack_groups  # noqa: E402
from grpo.types import Group  # noqa: E402
from rewards import Problem, RewardResult  # noqa: E402
from rollouts import Completion  # noqa: E402

GROUP = 16
"""Completions of one problem."""


def make_groups(num: int, tokens: int, experts: tuple[int, int] | None, seed: int) -> list[Group]:
    """Groups of different completions, as sampling leaves them."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)

    def drawn() -> Completion:
        shape = None if experts is None else (experts[0], tokens - 1, experts[1])
        return Completion(
            token_ids=[draw.randrange(150_000) for _ in range(tokens)],
            logprobs=np.log(numbers.random(tokens, dtype=np.float32)).tolist(),
            finish_reason="length",
            policy_version=7,
            experts_MTK=None if shape is None else numbers.integers(0, 64, shape, dtype=np.uint8),
        )

    return [
        Group(
            problem=Problem(id=str(place), prompt="What is 6 times 7?"),
            prompt_ids=list(range(32)),
            completions=(completions := [drawn() for _ in range(GROUP)]),
            texts=[" ".join(map(str, completion.token_ids)) for completion in completions],
            results=[RewardResult(reward=draw.random(), breakdown={"math": 1.0}, elapsed_s=0.01) for _ in completions],
        )
        for place in range(num // GROUP)
    ]


def main() -> None:
    """Measure, and print a line on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=1024, help="of all ranks")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--experts", type=int, nargs=2, metavar=("LAYERS", "EACH"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    ranks = Ranks(cpu=True)
    shape = None if arguments.experts is None else (arguments.experts[0], arguments.experts[1])
    own = make_groups(arguments.completions // ranks.size, arguments.tokens, shape, seed=ranks.rank)
    problems = [Problem(id=str(place), prompt="") for place in range(len(own) * ranks.size)]
    seconds = list[float]()
    for _ in range(arguments.rounds):
        ranks.wait()
        started = time.perf_counter()
        gather_groups(own, problems, ranks)
        seconds.append(ranks.max_number(time.perf_counter() - started))
    if ranks.is_main:
        best, middle = min(seconds) * 1e3, median(seconds) * 1e3
        print(f"{len(pack_groups(own)) / 1e6:.2f} MB a rank, {best:.0f} ms (median {middle:.0f})")
    ranks.close()


if __name__ == "__main__":
    main()
