"""A training pass over groups that share their prompts, against the same rows gone over one by one.

A pass is log-probabilities of the completions, their mean, and its gradient; random weights of real shapes, in bf16 on
a GPU and in fp32 on a CPU. Completions are of one length, or, ragged, from a half to three halves of it. Beside the
times stand how far apart the two ways' log-probabilities and gradients are: rounding, since both compute the same.

    python benchmarks/shared_prompts.py [--shapes cpu_ds | qwen05 dsv3_05] [--prompts 32 256 1024] [--groups 1]
                                        [--group-size 16] [--completion 512] [--ragged] [--rounds 5] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[0] = str(Path(__file__).parents[1])  # a script's own folder comes first, and there `policy` is a file

import policy as policies  # noqa: E402
from benchmarks.rollouts import WORKS, machine  # noqa: E402
from policy import PackedRows, Policy  # noqa: E402
from policy.logprobs import token_logprobs  # noqa: E402


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Rows of a pass."""

    token_ids_N: Tensor
    rows: PackedRows
    """With what they share."""
    wanted_N: Tensor
    """True at completions."""


def main() -> None:
    """Measure both ways for each shape and prompt, print a table, write JSON if asked."""
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=WORKS, default=["qwen05", "dsv3_05"] if is_gpu else ["cpu_ds"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 256, 1024], help="tokens of a prompt")
    parser.add_argument("--groups", type=int, default=1, help="prompts of a pass")
    parser.add_argument("--group-size", type=int, default=16, help="completions of a prompt")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion, in the mean")
    parser.add_argument("--ragged", action="store_true", help="completions of unequal length")
    parser.add_argument("--layers", type=int, help="fewer layers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if is_gpu else "float32")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    found = []
    head = ("prompt", "tokens", "shared", "ms", "shared", "ratio", "GiB", "shared", "logp apart", "gradient apart")
    print(f"{'':<10}" + "".join(name.rjust(15 if len(name) > 9 else 9) for name in head))
    for name in arguments.shapes:
        for prompt in arguments.prompts:
            found += compare(name, prompt, arguments)
    kind = "ragged" if arguments.ragged else "equal"
    print(
        f"{arguments.groups} x {arguments.group_size} x {arguments.completion} ({kind}), {arguments.dtype}; {machine()}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(name: str, prompt: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both ways over the same rows, printed and as rows for JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = WORKS[name].shape
    shape = shape.model_copy(update={"num_hidden_layers": arguments.layers} if arguments.layers else {})
    with torch.device(device):
        policy = Policy(shape)
    policies.initialise(policy, seed=0)
    policies.cast_weights(policy, getattr(torch, arguments.dtype))
    work = draw(shape.vocab_size, prompt, arguments, device)
    apart, gradient_apart = differ(policy, work)
    times, peaks = measure(policy, work, arguments.rounds)
    ratio = times[0] / times[1]
    assert work.rows.shared is not None
    counts = (prompt, len(work.token_ids_N), len(work.rows.shared.token_U))
    cells = [*map(str, counts), *(f"{1e3 * seconds:.1f}" for seconds in times), f"{ratio:.2f}"]
    cells += [f"{peak:.2f}" for peak in peaks]
    print(
        f"{name:<10}" + "".join(f"{cell:>9}" for cell in cells) + f"{apart:>15.1e}{gradient_apart:>15.1e}", flush=True
    )
    return [
        {
            "name": f"shared_prompts/{name}/{prompt}",
            "ours": round(1e3 * times[1], 3),
            "peer": round(1e3 * times[0], 3),
            "ratio": round(ratio, 3),
            "unit": "ms",
            "peer_name": "each row by itself",
            "machine": machine(),
            "versions": {"torch": importlib.metadata.version("torch")},
        }
    ]


def draw(vocab_size: int, prompt: int, arguments: argparse.Namespace, device: str) -> Work:
    """Random tokens; every group's completions have the same lengths."""
    generator, size = torch.Generator().manual_seed(0), arguments.group_size
    steps = [i - (size - 1) / 2 for i in range(size)] if arguments.ragged else [0.0] * size
    lengths = [round(arguments.completion * (1 + step / size)) for step in steps]
    token_ids, wanted = list[Tensor](), list[Tensor]()
    for _ in range(arguments.groups):
        start = torch.randint(3, vocab_size, (prompt,), generator=generator)
        for length in lengths:
            token_ids += [start, torch.randint(3, vocab_size, (length,), generator=generator)]
            wanted += [torch.zeros(prompt, dtype=torch.bool), torch.ones(length, dtype=torch.bool)]
    rows = PackedRows.of(
        [prompt + length for length in lengths] * arguments.groups,
        device,
        prefixes=[prompt] * arguments.groups,
        prefix_of_row=[g for g in range(arguments.groups) for _ in range(size)],
    )
    return Work(token_ids_N=torch.cat(token_ids).to(device), rows=rows, wanted_N=torch.cat(wanted).to(device))


def run(policy: Policy, work: Work, rows: PackedRows) -> Tensor:
    """One pass: log-probabilities [N], and a gradient on every weight."""
    policy.zero_grad(set_to_none=True)
    logprobs_N = token_logprobs(policy, work.token_ids_N, rows, work.wanted_N).logprobs_N
    loss = -logprobs_N.sum() / work.wanted_N.sum()
    loss.backward()
    return logprobs_N.detach()


def differ(policy: Policy, work: Work) -> tuple[float, float]:
    """Mean difference of the completions' log-probabilities, nats, and that of the gradient as a share of its norm."""
    found = []
    for rows in (work.rows.alone, work.rows):
        logprobs_N = run(policy, work, rows)
        found.append((logprobs_N, [w.grad.clone() for w in policy.parameters() if w.grad is not None]))
    (alone_N, alone), (shared_N, shared) = found
    difference, norm = (
        sum(float(x.float().square().sum()) for x in gradients) ** 0.5
        for gradients in ([a - b for a, b in zip(alone, shared, strict=True)], alone)
    )
    return float((alone_N - shared_N)[work.wanted_N].abs().mean()), difference / norm


def measure(policy: Policy, work: Work, rounds: int) -> tuple[list[float], list[float]]:
    """Median seconds, and GiB of GPU memory at most, of a pass over each row by itself and over shared prompts.

    The two take turns, so that a machine's moods meet both; the first turn is not counted.
    """
    is_gpu = torch.cuda.is_available()
    times: tuple[list[float], list[float]] = ([], [])
    peaks = [0.0, 0.0]
    for _ in range(1 + rounds):
        for way, rows in enumerate((work.rows.alone, work.rows)):
            if is_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run(policy, work, rows)
            if is_gpu:
                torch.cuda.synchronize()
                peaks[way] = torch.cuda.max_memory_allocated() / 2**30
            times[way].append(time.perf_counter() - start)
    return [statistics.median(of_way[1:]) for of_way in times], peaks


if __name__ == "__main__":
    main()
