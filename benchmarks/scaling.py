"""What a step would cost on 8 to 512 GPUs, on paper: measured phases of one GPU, and assumed links.

Every GPU keeps the work of one (weak scaling), so sampling, grading and the update's arithmetic stay as they are. What
is added:

- messages of weights and gradients, by the way in which weights are kept (docs/scaling.md has the table);
- completions that every rank gets from every other (what Python does for them; their bytes are few beside weights), and
  that the first rank writes to disk.

A ring of n ranks moves (n - 1) / n of the bytes over each rank's link, twice for sums. Within a node a rank's link is
NVLink; beyond, the node's network cards together, if these are slower. Messages of a pass over weights in pieces travel
while it computes: only what is longer than the pass is counted. Nothing is said of stragglers.

    python benchmarks/scaling.py [--phases benchmarks/scaling_phases.json] [--gpus 1 8 64 512] [--measure-host]
                                 [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

Way = Literal["ddp", "fsdp2", "zero2", "zero3"]
HALF, FULL = 2, 4
"""Bytes of a number in bf16 and in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A step on one GPU."""

    name: str
    source: str
    """Where the figures were measured."""
    sample_s: float
    grade_s: float
    update_s: float
    completions: int
    """Of one step."""
    tokens: int
    """Of one completion."""
    micro_batches: int
    """Of one step."""
    layers: int
    parameters: float
    root_parameters: float
    """Of them, embedding, final norm and head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Between GPUs."""

    source: str
    gpus_per_node: int
    nvlink_bytes_per_s: float
    """Of one GPU, each way."""
    network_bytes_per_s: float
    """Of the network card of one GPU, each way."""
    efficiency: float
    """Share of these rates that a message gets."""
    latency_s: float
    """Of one message, times the levels of a tree over all ranks."""

    def seconds(self, num_bytes: float, ranks: int, messages: int = 1) -> float:
        """To gather, or to reduce and scatter, so many bytes over all ranks; a sum on all ranks is both."""
        if ranks == 1:
            return 0.0
        rate = self.nvlink_bytes_per_s
        if ranks > self.gpus_per_node:
            rate = min(rate, self.network_bytes_per_s * self.gpus_per_node)
        moved = num_bytes * (ranks - 1) / ranks / (rate * self.efficiency)
        return moved + messages * self.latency_s * (ranks - 1).bit_length()


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What Python does for one completion of `Work.tokens` tokens."""

    source: str
    gathered_s: float
    """To take it from another rank, on every rank."""
    recorded_s: float
    """To write it down, on the first rank."""


def messages_of(work: Work, way: Way, links: Links, ranks: int) -> tuple[float, float]:
    """Seconds of messages that the update hides at best, and of those that it waits for."""
    weights, gradients = work.parameters * HALF, work.parameters * FULL
    blocks, passes = work.layers + 1, work.micro_batches
    if way == "ddp":  # gradients summed in fp32, once
        return 0.0, links.seconds(2 * gradients, ranks, messages=2)
    if way == "zero2":  # gradients in fp32 after every pass, new weights after the step
        return passes * links.seconds(gradients, ranks, messages=blocks), links.seconds(weights, ranks)
    # Weights put together forward and backward, gradients in fp32; then a copy for the sampler.
    each = links.seconds(2 * weights + gradients, ranks, messages=3 * blocks)
    return passes * each, links.seconds(weights, ranks, messages=blocks)


def step_of(work: Work, way: Way, links: Links, host: Host, ranks: int) -> dict[str, float | str]:
    """Seconds of a step, by what they go to, and what adds most to the step of one GPU."""
    hidden, waited = messages_of(work, way, links, ranks)
    others = work.completions * (ranks - 1)
    added = {
        "messages": max(0.0, hidden - work.update_s) + waited,
        "gathering": others * host.gathered_s,
        "recording": others * host.recorded_s,
    }
    alone = work.sample_s + work.grade_s + work.update_s
    step = alone + sum(added.values())
    return {
        "step_s": step,
        **added,
        "efficiency": alone / step,
        "tokens_per_s": ranks * work.completions * work.tokens / step,
        "binds": max(added, key=lambda name: added[name]) if ranks > 1 else "",
    }


def memory_of(work: Work, way: Way, ranks: int) -> float:
    """Bytes a GPU of weights, the sampler's copy, gradients, masters and moments; without activations and cache."""
    p, root = work.parameters, work.root_parameters
    if way == "ddp":
        return p * (HALF + HALF + 4 * FULL)  # weights, gradients of a pass, their sum, master, two moments
    if way == "fsdp2":
        return p * (HALF + 4 * FULL / ranks) + root * HALF  # the sampler's copy, and a sixteenth of all else
    if way == "zero2":
        return p * (HALF + 4 * FULL / ranks)
    return p * (HALF + (HALF + 4 * FULL) / ranks) + root * HALF


def measure_host(tokens: int, completions: int = 256, rounds: int = 20) -> Host:
    """On this machine, with completions of different tokens; the fastest of some rounds."""
    from grpo.distributed import Ranks
    from grpo.exchange import pack_groups, unpack_groups
    from grpo.record import RunFolder
    from grpo.types import Answer, Group, Question
    from rewards import Problem, RewardResult
    from rollouts import Completion

    problem = Problem(id="0", prompt="What is 6 times 7?")
    completion = Completion(
        token_ids=[(7919 * n) % 150_000 for n in range(tokens)],
        logprobs=[-1 / (1 + n % 97) for n in range(tokens)],
        finish_reason="length",
        policy_version=0,
    )
    group = Group(
        problem=problem, prompt_ids=list(range(32)), completions=[completion] * completions,
        texts=[" ".join(map(str, completion.token_ids))] * completions,
        results=[RewardResult(reward=1.0, breakdown={"score": 1.0})] * completions,
    )  # fmt: skip
    question, ranks = Question(number=0, place=0, problem=problem), Ranks(cpu=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch), print)
        gathered, recorded = [], []
        for _ in range(rounds):
            sent = pack_groups([group])
            started = time.perf_counter()
            unpack_groups(ranks.gather_bytes(sent)[0], [problem])
            gathered.append(time.perf_counter() - started)
            started = time.perf_counter()
            folder.add_rollouts(1, [Answer(question=question, group=group)], [[0.5] * completions])
            recorded.append(time.perf_counter() - started)
    return Host(
        source="measured now",
        gathered_s=min(gathered) / completions,
        recorded_s=min(recorded) / completions,
    )


def rows_of(phases: Mapping[str, Any], gpus: list[int]) -> list[dict[str, Any]]:
    """Every work, way and number of GPUs as a row; seconds, tokens a second, GiB a GPU."""
    links, host = Links(**phases["links"]), Host(**phases["host"])
    return [
        {
            "work": work.name,
            "way": way,
            "gpus": ranks,
            **step_of(work, way, links, host, ranks),
            "state_gib": memory_of(work, way, ranks) / 2**30,
        }
        for work in (Work(**values) for values in phases["works"])
        for way in get_args(Way)
        for ranks in gpus
    ]


def main() -> None:
    """Print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", type=Path, default=Path(__file__).with_name("scaling_phases.json"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 256, 512])
    parser.add_argument("--measure-host", action="store_true", help="print what Python takes for a completion here")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    phases = json.loads(arguments.phases.read_text())
    if arguments.measure_host:
        print(measure_host(phases["works"][0]["tokens"]))
        return
    rows = rows_of(phases, arguments.gpus)
    print(
        f"{'work':<10}{'way':<7}{'GPUs':>6}{'s a step':>10}{'messages':>10}{'gathering':>11}{'recording':>11}", end=""
    )
    print(f"{'efficiency':>12}{'tokens/s':>13}{'state GiB':>11}  binds")
    for row in rows:
        print(
            f"{row['work']:<10}{row['way']:<7}{row['gpus']:>6}{row['step_s']:>10.2f}{row['messages']:>10.3f}"
            f"{row['gathering']:>11.2f}{row['recording']:>11.2f}{row['efficiency']:>12.0%}{row['tokens_per_s']:>13,.0f}"
            f"{row['state_gib']:>11.2f}  {row['binds']}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
