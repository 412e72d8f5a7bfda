"""Tokens sampled a second: the built-in engine beside `generate` of transformers and vLLM, on the same weights.

Random weights of real shapes, groups of completions of fixed length, no end of sequence. The engine records
log-probabilities; `generate` does not, and is given prompts of one length, so that it need not pad. Each side is run
once before it is timed, vLLM on 64 tokens. vLLM has an interpreter of its own, named by `--vllm-python`; its rates are
measured there, on the same checkpoints, after ours has let go of the device: one process for each work, which start
together and then sample one after the other. With `--ranks 2` ours and `generate` each run in two processes
of one thread, which share the prompts out, as the ranks of `grpo train` do; vLLM has its own way of using the cores.

    python benchmarks/rollouts.py [--works cpu_ds smollm2 | qwen05 dsv3_05] [--ranks N] [--vllm-python PYTHON]
                                  [--rounds 3] [--vllm-rounds N] [--json PATH]
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

sys.path[0] = str(Path(__file__).parents[1])  # a script's own folder comes first, and there `rollouts` is this file

import policy as policies  # noqa: E402
from grpo.routing_replay import pack_experts  # noqa: E402
from policy import PackedRows, Policy, PolicyConfig  # noqa: E402
from policy.logprobs import token_logprobs  # noqa: E402
from rollouts import Completion, EngineConfig, SamplingParams, make_engine  # noqa: E402


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is sampled."""

    shape: PolicyConfig
    batches: tuple[tuple[int, int], ...]
    """(prompts, completions of each)."""
    num_new: int
    """Tokens of a completion."""
    prompt_length: int = 32
    cpu_dtype: torch.dtype = torch.float32
    """Where there is no GPU; on one it is bf16."""


WORKS = {
    "cpu_ds": Work(  # DeepSeek-V3's architecture at 4 M
        shape=PolicyConfig(
            vocab_size=128, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=64, qk_rope_head_dim=32,
            qk_nope_head_dim=64, v_head_dim=64, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        ),
        batches=((16, 8),), num_new=64,
    ),
    "smollm2": Work(  # SmolLM2-135M
        shape=PolicyConfig(
            model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=2048,
            rope_theta=100000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        ),
        batches=((8, 8),), num_new=64, cpu_dtype=torch.bfloat16,
    ),
    "qwen05": Work(  # Qwen2.5-0.5B
        shape=PolicyConfig(
            model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        batches=((16, 16), (64, 16)), num_new=512,
    ),
    "dsv3_05": Work(  # DeepSeek-V3's architecture at 0.5 B
        shape=PolicyConfig(
            vocab_size=32768, hidden_size=768, intermediate_size=2048, moe_intermediate_size=256,
            num_hidden_layers=12, num_attention_heads=12, n_routed_experts=64, num_experts_per_tok=6,
            kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
            max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        batches=((16, 16), (64, 16)), num_new=512,
    ),
}  # fmt: skip

VLLM_SCRIPT = """
import json, statistics, sys, time
from vllm import LLM, SamplingParams
folder, dtype, is_gpu, rounds, num_new, prompts, batches = json.loads(sys.argv[1])
if __name__ == "__main__":
    start = time.time()
    room = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 16 * 2**30} if is_gpu else {}
    engine = LLM(model=folder, dtype=dtype, skip_tokenizer_init=True, max_model_len=2048 if is_gpu else 256,
                 max_num_seqs=1024, enable_prefix_caching=True, **room)
    print("READY " + json.dumps(time.time() - start), flush=True)
    sys.stdin.readline() or sys.exit()  # somebody else may be sampling
    rates = []
    for count, group in batches:
        times = []
        for length in [min(64, num_new)] + rounds * [num_new]:
            params = SamplingParams(
                n=group, temperature=1.0, max_tokens=length, logprobs=0, ignore_eos=True, detokenize=False
            )
            start = time.time()
            done = engine.generate([{"prompt_token_ids": ids} for ids in prompts[:count]], params, use_tqdm=False)
            times.append(time.time() - start)
        count = sum(len(one.token_ids) for request in done for one in request.outputs)
        rates.append(count / statistics.median(times[1:]))
    print("RESULT " + json.dumps(rates), flush=True)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One work, and what was measured of it."""

    name: str
    work: Work
    dtype: torch.dtype
    num_new: int
    """Tokens of a completion."""
    prompts_PS: torch.Tensor
    folder: Path
    """Of the model."""
    rates: dict[str, list[float]]
    """Tokens a second of each side, for each batch."""


def main() -> None:
    """Measure each work on both sides, print a table, write JSON if asked."""
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=["qwen05", "dsv3_05"] if is_gpu else ["cpu_ds"])
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--ranks", type=int, default=1, help="processes of one thread each, on a CPU")
    parser.add_argument("--num-new", type=int, help="other lengths of completions, to try the script out")
    parser.add_argument("--no-generate", action="store_true", help="leave transformers' generate out")
    parser.add_argument("--profile", action="store_true", help="print where our decoding spends the GPU's time")
    parser.add_argument("--vllm-python", help="interpreter that has vLLM")
    parser.add_argument("--vllm-rounds", type=int, help="timed runs of vLLM, where fewer will do")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        works = [
            measure(name, WORKS[name], arguments, "cuda" if is_gpu else "cpu", Path(scratch) / name)
            for name in arguments.works
        ]
        if arguments.vllm_python:
            measure_vllm(arguments, works)
    rows = [row for work in works for row in rows_of(work)]
    print(f"{'work':<24}{'peer':<10}{'ours':>10}{'peer':>10}{'ratio':>8}  unit")
    for row in rows:
        peer, ratio = row["peer"] or "", row["ratio"] or ""
        print(f"{row['name']:<24}{row['peer_name']:<10}{row['ours']:>10}{peer:>10}{ratio:>8}  {row['unit']}")
    print(f"{machine()}; {versions()}; medians of {arguments.rounds}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(name: str, work: Work, arguments: argparse.Namespace, device: str, folder: Path) -> Measured:
    """Rates of ours and of `generate` on one work; writes the model to the folder."""
    dtype = torch.bfloat16 if device == "cuda" else work.cpu_dtype
    num_new = arguments.num_new or work.num_new
    generator = torch.Generator().manual_seed(0)
    most = max(prompts for prompts, _ in work.batches)
    prompts_PS = torch.randint(3, min(32000, work.shape.vocab_size), (most, work.prompt_length), generator=generator)
    with torch.device(device):
        ours = Policy(work.shape)
    policies.initialise(ours, seed=0)
    policies.cast_weights(ours, dtype)
    policies.save(ours, folder)
    rates: dict[str, list[float]] = {}
    if arguments.ranks == 1:
        rates["ours"] = our_rates(ours, prompts_PS, work, num_new, arguments)
    del ours
    release(device)
    if arguments.ranks > 1:
        for side in ("ours",) if arguments.no_generate else ("ours", "generate"):
            rates[side] = [
                rate_of_ranks(
                    Part(
                        side=side,
                        folder=str(folder),
                        dtype=dtype,
                        prompts_PS=prompts_PS[:count],
                        group=group,
                        num_new=num_new,
                        rounds=arguments.rounds,
                    ),
                    arguments.ranks,
                )
                for count, group in work.batches
            ]
    elif not arguments.no_generate:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        rates["generate"] = [
            rate_of(
                generate_run(theirs, prompts_PS[:count], group, num_new),
                1 if device == "cuda" else arguments.rounds,
            )
            for count, group in work.batches
        ]
        del theirs
        release(device)
    return Measured(
        name=name, work=work, dtype=dtype, num_new=num_new, prompts_PS=prompts_PS, folder=folder, rates=rates
    )


def rows_of(one: Measured) -> list[dict[str, Any]]:
    """A row for each peer and batch."""
    return [
        {
            "name": f"{one.name}/{count}x{group}x{one.num_new}",
            "peer_name": peer,
            "ours": round(ours),
            "peer": round(theirs) if theirs else None,
            "ratio": round(ours / theirs, 2) if theirs else None,
            "unit": "tokens/s",
            "machine": machine(),
            "versions": versions(),
        }
        for peer in ([side for side in one.rates if side != "ours"] or ["none"])
        for (count, group), ours, theirs in zip(
            one.work.batches, one.rates["ours"], one.rates.get(peer, [0.0] * len(one.work.batches)), strict=True
        )
    ]


def our_rates(
    policy: Policy, prompts_PS: torch.Tensor, work: Work, num_new: int, arguments: argparse.Namespace
) -> list[float]:
    """Tokens a second of the built-in engine for each batch; prints the start-up and the agreement with the trainer."""
    rates, params = [], SamplingParams(max_completion_length=num_new, record_experts=True)
    start = time.perf_counter()
    engine = make_engine(
        policy, EngineConfig(max_num_seqs=1024, cache_gib=1.0 if policy.device.type == "cpu" else 16.0)
    )
    engine.generate(prompts_PS[:1].tolist(), 1, SamplingParams(max_completion_length=1))
    print(f"ours: {time.perf_counter() - start:.1f} s from a policy in memory to the first token", flush=True)
    for count, group in work.batches:
        groups: list[list[Completion]] = []

        def run(count: int = count, group: int = group) -> int:
            nonlocal groups
            groups = engine.generate(prompts_PS[:count].tolist(), group, params)
            return sum(len(completion.token_ids) for of_prompt in groups for completion in of_prompt)

        rates.append(rate_of(run, arguments.rounds))
        print(f"ours: {count} x {group}: {rates[-1]:.0f} tokens/s", flush=True)
        for replay in (False, True) if work.shape.num_moe_layers else (False,):
            mean, most = logprob_difference(policy, prompts_PS, groups, replay=replay)
            print(f"  log-probabilities against the trainer's{', experts replayed' if replay else ''}: "
                  f"mean {mean:.2e}, max {most:.2e} nats", flush=True)  # fmt: skip
    if arguments.profile and policy.device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            engine.generate(
                prompts_PS[: work.batches[0][0]].tolist(), work.batches[0][1], SamplingParams(max_completion_length=64)
            )
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70))
    engine.close()
    return rates


@torch.no_grad()
def logprob_difference(
    policy: Policy, prompts_PS: torch.Tensor, groups: Sequence[Sequence[Completion]], *, replay: bool
) -> tuple[float, float]:
    """Mean and largest |recorded - trainer's log-probability| over the first completions of each prompt."""
    pairs = [(p.tolist(), group[0]) for p, group in zip(prompts_PS, groups, strict=False)][:16]
    rows = PackedRows.of([len(p) + len(c.token_ids) for p, c in pairs], policy.device)
    ids_N = torch.tensor([t for p, c in pairs for t in (*p, *c.token_ids)], device=policy.device)
    mask_N = torch.tensor([i >= len(p) for p, c in pairs for i in range(len(p) + len(c.token_ids))]).to(policy.device)
    given_NMK = pack_experts([(len(p), c) for p, c in pairs]) if replay else None
    given_MNK = None if given_NMK is None else given_NMK.transpose(0, 1).to(policy.device)
    theirs = token_logprobs(policy, ids_N, rows, mask_N, given_experts_MNK=given_MNK).logprobs_N[mask_N].cpu()
    difference = (torch.tensor([x for _, c in pairs for x in c.logprobs]) - theirs).abs()
    return float(difference.mean()), float(difference.max())


def generate_run(model: PreTrainedModel, prompts_PS: torch.Tensor, group: int, num_new: int) -> Callable[[], int]:
    """One call of `generate`; gives the number of tokens sampled."""
    config = GenerationConfig(
        max_new_tokens=num_new, do_sample=True, temperature=1.0, top_k=0, eos_token_id=None, pad_token_id=0
    )
    model.generation_config = config  # what is None in the one passed is taken from this one
    input_ids = prompts_PS.repeat_interleave(group, dim=0).to(model.device)

    def run() -> int:
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
        return int(output[:, prompts_PS.shape[1] :].numel())

    return run


def measure_vllm(arguments: argparse.Namespace, works: Sequence[Measured]) -> None:
    """Add vLLM's rates to those of each work; where it fails, say why and go on."""
    processes = []
    for one in works:
        request = [
            str(one.folder),
            str(one.dtype).removeprefix("torch."),
            torch.cuda.is_available(),
            arguments.vllm_rounds or arguments.rounds,
            one.num_new,
            one.prompts_PS.tolist(),
            one.work.batches,
        ]
        script, log = one.folder / "run_vllm.py", one.folder / "vllm.log"
        script.write_text(VLLM_SCRIPT)
        with log.open("w") as errors:
            processes.append(
                subprocess.Popen(
                    [arguments.vllm_python, str(script), json.dumps(request)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"},
                    text=True,
                )
            )
    loading = [read_answer(process, "READY ") for process in processes]
    for one, process, seconds in zip(works, processes, loading, strict=True):
        rates = None
        if seconds is not None:
            print(f"vLLM: {seconds:.1f} s to start, {len(works)} at once", flush=True)
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            rates = read_answer(process, "RESULT ")
        process.communicate()
        if rates is None:
            print(f"vLLM failed on {one.name}:\n{(one.folder / 'vllm.log').read_text()[-3000:]}", flush=True)
        else:
            one.rates["vllm"] = rates
            print(f"vLLM: {one.name}, tokens/s: {[round(rate) for rate in rates]}", flush=True)


def read_answer(process: subprocess.Popen[str], mark: str) -> Any:
    """What a line that begins so says; None if the process ends without one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(mark):
            return json.loads(line.removeprefix(mark))
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one rank samples, or all together."""

    side: str
    """`ours` or `generate`."""
    folder: str
    """Of the model."""
    dtype: torch.dtype
    prompts_PS: torch.Tensor
    """Token ids, all prompts of one length."""
    group: int
    """Completions a prompt."""
    num_new: int
    """Tokens a completion."""
    rounds: int
    """Runs that count."""


def rate_of_ranks(whole: Part, ranks: int) -> float:
    """Median tokens a second of processes that start each run together; a run lasts until the last is done."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=sample_part, args=(replace(whole, prompts_PS=part_PS), barrier, results), daemon=True)
        for part_PS in whole.prompts_PS.tensor_split(ranks)
    ]
    for process in processes:
        process.start()
    runs = [results.get(timeout=3600) for _ in range(ranks * whole.rounds)]
    for process in processes:
        process.join()
    rates = []
    for turn in range(whole.rounds):
        of_turn = [run for run in runs if run[0] == turn]
        seconds = max(end for _, _, end, _ in of_turn) - min(begin for _, begin, _, _ in of_turn)
        rates.append(sum(count for _, _, _, count in of_turn) / seconds)
    print(f"{whole.side}: {ranks} ranks, tokens/s of each run: {[round(rate) for rate in rates]}", flush=True)
    return statistics.median(rates)


def sample_part(part: Part, barrier: Barrier, results: Queue[tuple[int, float, float, int]]) -> None:
    """One rank: a run that does not count, then those that begin with all others'."""
    torch.set_num_threads(1)
    if part.side == "ours":
        params = SamplingParams(max_completion_length=part.num_new)
        engine = make_engine(
            policies.load(part.folder, dtype=part.dtype), EngineConfig(max_num_seqs=1024, cache_gib=1.0)
        )

        def run() -> int:
            groups = engine.generate(part.prompts_PS.tolist(), part.group, params)
            return sum(len(completion.token_ids) for of_prompt in groups for completion in of_prompt)

    else:
        theirs = AutoModelForCausalLM.from_pretrained(part.folder, dtype=part.dtype).eval()
        run = generate_run(theirs, part.prompts_PS, part.group, part.num_new)
    run()
    for turn in range(part.rounds):
        barrier.wait()
        begin = time.perf_counter()
        count = run()
        results.put((turn, begin, time.perf_counter(), count))


def rate_of(run: Callable[[], int], rounds: int) -> float:
    """Median tokens a second; one run before, not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        count = run()
        times.append(time.perf_counter() - start)
    return count / statistics.median(times[1:])


def release(device: str) -> None:
    """Give memory back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def versions() -> str:
    """Of the packages on our side."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers"))


def machine() -> str:
    """The GPU's or the processor's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
