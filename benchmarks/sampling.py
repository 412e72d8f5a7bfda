"""Tokens sampled a second: the built-in engine against `generate` of transformers, on the same weights.

A small MLA + MoE policy in fp32 on the CPU; 16 prompts, 8 completions of each, 64 tokens of each, no end of sequence.
The peer gets prompts of one length, so that it need not pad, and records no log-probabilities; the engine records them.
Both run in this process, in turns; medians.

    python benchmarks/sampling.py [--rounds 3] [--threads 1] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import policy as policies
from policy import Policy, PolicyConfig
from rollouts import EngineConfig, SamplingParams, make_engine

SHAPE = PolicyConfig(
    vocab_size=128, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=64, qk_rope_head_dim=32,
    qk_nope_head_dim=64, v_head_dim=64, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NUM_PROMPTS, PROMPT_LENGTH, NUM_GENERATIONS, NUM_NEW = 16, 32, 8, 64


def main() -> None:
    """Check that both run the same model, time them in turns, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    ours = Policy(SHAPE)
    policies.initialise(ours, seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts_PS = torch.randint(3, SHAPE.vocab_size, (NUM_PROMPTS, PROMPT_LENGTH), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        policies.save(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        difference = float((ours.logits(prompts_PS) - theirs(prompts_PS).logits).abs().max())
    if difference > 1e-3:
        sys.exit(f"the two models differ: logits are up to {difference:.3g} apart, so their speeds cannot be compared")

    rows = []
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        runs = {
            "ours": engine_run(ours, prompts_PS, temperature),
            "peer": peer_run(theirs, prompts_PS, temperature),
        }
        for unit, rates in time_in_turns(runs, arguments.rounds).items():
            rows.append(
                {
                    "name": f"sampling/{name}",
                    **{side: round(rate, 1) for side, rate in rates.items()},
                    "ratio": round(rates["ours"] / rates["peer"], 3),
                    "unit": unit,
                    "machine": f"{machine()}, threads={arguments.threads}",
                    "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
                }
            )
    print(f"{'name':<20}{'ours':>10}{'peer':>10}{'ratio':>8}  unit   (logits agree to {difference:.1e})")
    for row in rows:
        print(f"{row['name']:<20}{row['ours']:>10}{row['peer']:>10}{row['ratio']:>8}  {row['unit']}")
    print(f"{rows[0]['machine']}; {rows[0]['versions']}; medians of {arguments.rounds}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def engine_run(policy: Policy, prompts_PS: torch.Tensor, temperature: float) -> Callable[[], int]:
    """One call of the engine; gives the number of tokens sampled."""
    engine = make_engine(policy, EngineConfig())
    params = SamplingParams(max_completion_length=NUM_NEW, temperature=temperature)

    def run() -> int:
        groups = engine.generate(prompts_PS.tolist(), NUM_GENERATIONS, params)
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return run


def peer_run(model: PreTrainedModel, prompts_PS: torch.Tensor, temperature: float) -> Callable[[], int]:
    """One call of `generate`; gives the number of tokens sampled.

    Prompts are repeated beforehand since `num_return_sequences` refuses greedy decoding; `generate` would do the same.
    """
    is_greedy = temperature == 0
    config = GenerationConfig(
        max_new_tokens=NUM_NEW,
        do_sample=not is_greedy,
        temperature=None if is_greedy else temperature,
        top_k=None if is_greedy else 0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model.generation_config = config  # what is None in the one passed is taken from this one
    input_ids = prompts_PS.repeat_interleave(NUM_GENERATIONS, dim=0)

    def run() -> int:
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
        return int(output[:, prompts_PS.shape[1] :].numel())

    return run


def time_in_turns(runs: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Median tokens a second of each, by the clock and by processor time; one run of each first, not counted.

    Processor time, of all threads together, is what to read where other programs share the processor.
    """
    clocks = {"tokens/s": time.perf_counter, "tokens/CPU s": time.process_time}
    rates: dict[str, dict[str, list[float]]] = {unit: {side: [] for side in runs} for unit in clocks}
    for turn in range(rounds + 1):
        for side, run in runs.items():
            starts = {unit: clock() for unit, clock in clocks.items()}
            count = run()
            seconds = {unit: clock() - starts[unit] for unit, clock in clocks.items()}
            if count != (wanted := NUM_PROMPTS * NUM_GENERATIONS * NUM_NEW):
                sys.exit(f"{side} sampled {count} tokens where {wanted} were asked for")
            if turn:
                for unit in clocks:
                    rates[unit][side].append(count / seconds[unit])
    return {unit: {side: statistics.median(each) for side, each in sides.items()} for unit, sides in rates.items()}


def machine() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
