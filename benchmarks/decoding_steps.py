"""What a decoding step, a round of speculation and a short prompt take on a GPU: the time of a graph, and its kernels.

At few sequences a step waits for its kernels to follow each other, so both numbers matter. Random weights.

    python benchmarks/decoding_steps.py [--work dsv3_05] [--drafts 0 1 2 3] [--batches 1 8 64] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

from benchmarks.rollouts import WORKS, machine  # noqa: E402
from policy import Policy, PolicyConfig, cast_weights, initialise  # noqa: E402
from rollouts import EngineConfig, SamplingParams  # noqa: E402
from rollouts.builtin_engine import BuiltinEngine  # noqa: E402
from rollouts.graphs import rows_for  # noqa: E402

REPLAYS = 20
PROMPT = [3, 4, 5, 6] * 8


def main() -> None:
    """Measure every number of drafts at every batch, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="dsv3_05")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this is about CUDA graphs: it needs a GPU")
    num_modules = 1 if any(arguments.drafts) else 0
    shape = WORKS[arguments.work].shape.model_dump() | {"num_nextn_predict_layers": num_modules}
    policy = Policy(PolicyConfig.model_validate(shape))
    initialise(policy, seed=0)
    cast_weights(policy, torch.bfloat16).cuda()

    rows: list[dict[str, Any]] = []
    print(f"{'drafts':>6}{'batch':>7}{'graph ms':>10}{'kernels':>9}{'128 tokens ms':>15}{'1 token ms':>12}")
    for drafts, batch in itertools.product(arguments.drafts, arguments.batches):
        graph_ms, kernels, call_ms, prompt_ms = measure(policy, drafts, batch)
        print(f"{drafts:>6}{batch:>7}{graph_ms:>10.3f}{kernels:>9}{call_ms:>15.1f}{prompt_ms:>12.2f}", flush=True)
        rows.append(
            {
                "name": f"{arguments.work}/{drafts} drafts/batch {batch}",
                "peer_name": "none",
                "ours": round(graph_ms, 3),
                "peer": None,
                "ratio": None,
                "kernels": kernels,
                "call_ms": round(call_ms, 1),
                "prompt_ms": round(prompt_ms, 2),
                "unit": "ms",
                "machine": machine(),
                "versions": {"torch": importlib.metadata.version("torch")},
            }
        )
    print(f"{machine()}; torch {importlib.metadata.version('torch')}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(policy: Policy, drafts: int, batch: int) -> tuple[float, int, float, float]:
    """Of a graph: milliseconds and kernels; of a call for 128 tokens, and for one, of each sequence: milliseconds."""
    speculative = {"num_speculative_tokens": drafts, "max_batch": 1024}
    engine = BuiltinEngine(policy, EngineConfig.model_validate({"max_num_seqs": batch, "speculative": speculative}))
    prompts = [[3 + place, *PROMPT[1:]] for place in range(batch)]

    def call(length: int) -> None:
        engine.reset_prefix_cache()
        engine.generate(prompts, 1, SamplingParams(max_completion_length=length))

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    call(128)
    call_ms, prompt_ms = best_ms(lambda: call(128), 3), best_ms(lambda: call(1), 3)
    owner = engine._speculator if drafts else engine._runner
    assert owner is not None
    graph = owner._graphs.captured(rows_for(batch))
    graph_ms = best_ms(replay, 3) / REPLAYS
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        graph.replay()
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profiled.key_averages() if event.self_device_time_total)
    engine.close()
    return graph_ms, kernels, call_ms, prompt_ms


def best_ms(run: Callable[[], None], times: int) -> float:
    """The shortest of some runs."""
    elapsed = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        elapsed.append(time.perf_counter() - start)
    return min(elapsed) * 1e3


if __name__ == "__main__":
    main()
