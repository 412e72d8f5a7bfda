"""Tokens sampled a second with self-speculation and without, on one policy whose MTP module knows its text.

Speculation pays by how often drafts are accepted, so random weights say nothing: a policy of a real shape is first
trained on the countdown task's text, its MTP module with it, and then the module alone on what the policy itself says,
as in a GRPO run with `mtp_weight` and `mtp_num_recycled`. Then the same prompts are answered with and without drafts,
one completion each, which end where the policy ends them; both sides run once before they are timed.

    python benchmarks/speculation.py [--work dsv3_05] [--drafts 1 2 3 4] [--batches 1 8 64] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

from benchmarks.rollouts import WORKS, machine  # noqa: E402
from grpo.config import Config, load_config  # noqa: E402
from grpo.countdown import generate_problems, problem_text  # noqa: E402
from grpo.distributed import Ranks  # noqa: E402
from grpo.optimizer import MasterAdamW  # noqa: E402
from grpo.pretrain import build_policy, train_base  # noqa: E402
from policy import PackedRows, Policy, PolicyConfig, cast_weights, initialise  # noqa: E402
from policy.attention import Expanded  # noqa: E402
from policy.logprobs import ahead_losses  # noqa: E402
from policy.tokenizer import Tokenizer  # noqa: E402
from rollouts import Completion, EngineConfig, SamplingParams  # noqa: E402
from rollouts.builtin_engine import BuiltinEngine  # noqa: E402

LENGTH = 236
"""Most tokens of a completion."""


def main() -> None:
    """Train, measure every number of drafts at every batch, print a table, write JSON if asked."""
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="dsv3_05" if is_gpu else "cpu_ds")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--own-steps", type=int, default=200, help="steps of the module on the policy's own text")
    parser.add_argument("--recycled", type=int, default=2, help="further tokens that it learns to draft")
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()

    policy, tokenizer, prompts = trained_policy(arguments)
    params = SamplingParams(
        max_completion_length=LENGTH, temperature=arguments.temperature, stop_token_ids=(tokenizer.eos_token_id,)
    )
    plain = {size: measure(policy, 0, prompts[:size], params)[0] for size in arguments.batches}
    rows: list[dict[str, Any]] = []
    print(f"\n{'drafts':>6}{'batch':>7}{'with':>10}{'without':>10}{'ratio':>7}{'accepted':>10}  tokens/s")
    for drafts, size in itertools.product(arguments.drafts, arguments.batches):
        rate, accepted = measure(policy, drafts, prompts[:size], params)
        ratio = rate / plain[size]
        print(f"{drafts:>6}{size:>7}{rate:>10.0f}{plain[size]:>10.0f}{ratio:>7.2f}{accepted:>10.2f}", flush=True)
        rows.append(
            {
                "name": f"{arguments.work}/{drafts} drafts/batch {size}",
                "peer_name": "no drafts",
                "ours": round(rate),
                "peer": round(plain[size]),
                "ratio": round(ratio, 2),
                "accepted": round(accepted, 3),
                "unit": "tokens/s",
                "machine": machine(),
                "versions": {"torch": importlib.metadata.version("torch")},
            }
        )
    print(f"{machine()}; torch {importlib.metadata.version('torch')}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def trained_policy(arguments: argparse.Namespace) -> tuple[Policy, Tokenizer, list[list[int]]]:
    """The policy, its tokenizer, and as many held-out prompts as the largest batch has."""
    is_gpu = torch.cuda.is_available()
    overrides = [
        f"base.max_steps={arguments.base_steps}",
        f"base.tokens_per_step={arguments.tokens_per_step}",
        *("base.learning_rate=1e-3", "base.mtp_interval=1", "base.mtp_weight=0.3"),
        "base.attempts={go_on: 0.95, stop_when_right: 0.2, max_attempts: 18}",  # long texts: prompts cost little
        f"dtype={'bfloat16' if is_gpu else 'float32'}",
        f"device={'auto' if is_gpu else 'cpu'}",
    ]
    config = load_config(ROOT / "recipes/countdown_zero_cpu.yaml", overrides)
    assert config.base is not None
    assert config.dataset.countdown is not None
    _, tokenizer = build_policy(config, config.base, config.dataset.countdown)
    changes: dict[str, Any] = {"num_nextn_predict_layers": 1, "eos_token_id": tokenizer.eos_token_id}
    if arguments.layers:
        changes["num_hidden_layers"] = arguments.layers
    policy = Policy(PolicyConfig.model_validate(WORKS[arguments.work].shape.model_dump() | changes))
    initialise(policy, seed=0)
    cast_weights(policy, torch.bfloat16 if is_gpu else torch.float32)
    ranks = Ranks(cpu=not is_gpu)
    policy.to(ranks.device)

    last: dict[str, Any] = {}
    start = time.perf_counter()
    train_base(policy, tokenizer, config, config.base, config.dataset.countdown, ranks, last.update)
    print(f"base: {last['step']} steps, loss {last['loss']:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    problems = generate_problems(config.dataset.countdown, config.seed, "held_out")
    largest = max(arguments.batches)
    prompts = [render(next(problems), config, tokenizer) for _ in range(largest)]
    start = time.perf_counter()
    teach_module(policy, tokenizer, prompts, arguments.own_steps, arguments.recycled)
    print(f"module on own text: {arguments.own_steps} steps, {time.perf_counter() - start:.0f} s", flush=True)
    return policy, tokenizer, prompts


def render(row: dict[str, Any], config: Config, tokenizer: Tokenizer) -> list[int]:
    """A problem's prompt as token ids."""
    ids = tokenizer.inner.get_vocab()
    text = config.prompt_template.replace("{prompt}", problem_text(row["nums"], row["target"]))
    return [ids[word] for word in text.split()]


def teach_module(
    policy: Policy, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], steps: int, num_recycled: int
) -> None:
    """Train the MTP module, and nothing else, on completions of the policy."""
    engine = BuiltinEngine(policy, EngineConfig(max_num_seqs=1024))
    params = SamplingParams(max_completion_length=LENGTH, stop_token_ids=(tokenizer.eos_token_id,))
    groups = engine.generate(prompts, max(1, 1024 // len(prompts)), params)
    engine.close()
    texts = [
        [*prompt, *c.token_ids] for prompt, group in zip(prompts, groups, strict=True) for c in group if c.token_ids
    ]
    for name, weight in policy.named_parameters():
        weight.requires_grad_(name.startswith("mtp."))
    optimizer = MasterAdamW(policy, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(steps):
        taken = [texts[(step * 64 + k) % len(texts)] for k in range(64)]
        rows = PackedRows.of([len(text) for text in taken], policy.device)
        token_ids_N = torch.tensor([token for text in taken for token in text], device=policy.device)
        with torch.no_grad():
            hidden_NC = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
        losses = ahead_losses(policy, hidden_NC, token_ids_N, rows, is_detached=True, num_recycled=num_recycled)
        (torch.stack(losses.sums).mean() / losses.counts[0]).backward()
        optimizer.gather_gradients()
        optimizer.step(1e-3 * (1 - step / steps), 1.0)
    policy.requires_grad_(True)


def measure(
    policy: Policy, drafts: int, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[float, float]:
    """Tokens a second, and the share of drafts that were accepted."""
    speculative = {"num_speculative_tokens": drafts, "max_batch": 1024}
    engine = BuiltinEngine(policy, EngineConfig.model_validate({"max_num_seqs": 256, "speculative": speculative}))
    # A few answers one after another where the batch is small, lest one short answer decide.
    repeats = max(2, 16 // len(prompts))
    count, elapsed = 0, 0.0
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        seeds = [repeat * 1000 + place for place in range(len(prompts))]
        groups: list[list[Completion]] = engine.generate(prompts, 1, params, seeds)
        if repeat:
            elapsed += time.perf_counter() - start
            count += sum(len(c.token_ids) for group in groups for c in group)
    accepted = engine.num_accepted / max(1, engine.num_drafted)
    engine.close()
    return count / elapsed, accepted


if __name__ == "__main__":
    main()
