"""Training passes of the policy on one GPU against transformers: time, share of the matrix units' rate, peak memory.

A pass is log-probabilities of all next tokens, their mean, and its gradient: 32 rows of 1,024 tokens in bf16, random
weights of two real shapes, the same in both. The peer takes as many rows at a time as is fastest for it (32 at once may
not fit), with the fastest of its attention and experts implementations that are installed. Peak memory counts weights
and gradients. Ours is given for each kind of recomputation, and once more for rows of unequal length.

    python benchmarks/policy.py [--shapes qwen05 dsv3_05] [--rounds 5] [--json PATH]
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path[0] = str(Path(__file__).parents[1])  # a script's own folder comes first, and there `policy` is this file

import policy as policies  # noqa: E402
from policy import PackedRows, Policy, PolicyConfig  # noqa: E402
from policy.flops import Flops  # noqa: E402
from policy.logprobs import token_logprobs  # noqa: E402
from policy.recompute import Recomputation  # noqa: E402

SHAPES = {
    "qwen05": PolicyConfig(  # Qwen2.5-0.5B
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "dsv3_05": PolicyConfig(  # DeepSeek-V3's architecture at 0.5 B
        vocab_size=32768, hidden_size=768, intermediate_size=2048, moe_intermediate_size=256, num_hidden_layers=12,
        num_attention_heads=12, n_routed_experts=64, num_experts_per_tok=6, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    ),
}  # fmt: skip
DEEPSEEK_V3 = PolicyConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=128, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, kv_lora_rank=512,
    q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, first_k_dense_replace=3,
    max_position_embeddings=163840, routed_scaling_factor=2.5,
)  # fmt: skip
"""Of the released checkpoint; for the size of its cache alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One way of doing the pass."""

    name: str
    seconds: float
    """Median of the rounds."""
    first_seconds: float
    """The first pass of all, kernels compiled on the way."""
    peak_gib: float
    """Most memory allocated, weights and gradients included."""
    loss: float
    """Mean negative log-probability, nats."""


def main() -> None:
    """Measure both sides shape by shape, print tables, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes of each")
    parser.add_argument("--device", default="cuda", help="cpu tries the script out (with --layers 2 and short rows)")
    parser.add_argument("--peer-attention", nargs="+", default=["sdpa", "flash_attention_2", "flex_attention"])
    parser.add_argument("--peer-experts", nargs="+", default=["grouped_mm", "batched_mm", "eager"])
    parser.add_argument("--peer-rows", nargs="+", type=int, default=[32, 16, 8], help="rows at a time to try")
    parser.add_argument("--profile", action="store_true", help="print where our passes spend the GPU's time")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rate = matmul_rate(arguments.device)
    rows = []
    for name in arguments.shapes:
        shape = SHAPES[name].model_copy(update={"num_hidden_layers": arguments.layers} if arguments.layers else {})
        rows += compare(name, shape, rate, arguments)
    rows += compare_caches()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(name: str, shape: PolicyConfig, rate: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both sides of one shape, print them, and give the rows for JSON."""
    device, count, length = arguments.device, arguments.rows, arguments.row_length
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(3, min(32000, shape.vocab_size), (count, length), generator=generator).to(device)
    with torch.device(device):
        ours = Policy(shape)
    policies.initialise(ours, seed=0)
    policies.cast_weights(ours, dtype)
    with tempfile.TemporaryDirectory() as folder:
        policies.save(ours, folder)
        measured: list[Measured] = []
        for kind in get_args(Recomputation):
            measured.append(measure(f"ours, recomputation {kind}", our_pass(ours, ids_BS, kind), arguments.rounds))
        measured.append(measure("ours, rows of unequal length", ragged_pass(ours, ids_BS), arguments.rounds))
        ours.zero_grad(set_to_none=True)
        ours.cpu()  # so that the peer's peak is its own
        peers = list(measure_peers(folder, ids_BS, dtype, arguments))
    if not peers:
        sys.exit("the peer could not be run in any way")
    peer = min(peers, key=lambda one: one.seconds)
    if abs(peer.loss - measured[0].loss) > 0.02:
        sys.exit(f"the two models differ: loss {measured[0].loss:.4f} against {peer.loss:.4f}")
    operations = Flops.of(shape).training([length] * count)
    print(f"\n{name}: {count} rows of {length}; losses {measured[0].loss:.4f} and {peer.loss:.4f}")
    print(f"{'':<52}{'ms':>9}{'x peer':>8}{'GiB':>8}{'of peer':>9}{'of matmul rate':>16}{'first s':>9}")
    for one in (*measured, *peers):
        print(
            f"{one.name:<52}{1e3 * one.seconds:>9.1f}{peer.seconds / one.seconds:>8.2f}{one.peak_gib:>8.2f}"
            f"{one.peak_gib / peer.peak_gib:>9.2f}{operations / one.seconds / rate:>16.1%}{one.first_seconds:>9.1f}"
        )
    print(f"bf16 matrix products: {rate / 1e12:.0f} TFLOP/s; a pass: {operations / 1e12:.1f} T operations; {machine()}")
    if arguments.profile:  # last, since what it leaves behind slows the host down
        print_profile(our_pass(ours.to(device), ids_BS, "none"))
    return [row for one in measured for row in as_rows(f"policy/{name}/{one.name.removeprefix('ours, ')}", one, peer)]


def compare_caches() -> list[dict[str, Any]]:
    """Print what a cached token takes in bf16: here, with keys and values of every head, and of 8 heads."""
    rows = []
    print(f"\n{'bytes of the cache a token':<28}{'ours':>10}{'all heads':>11}{'ratio':>7}{'8 groups':>10}{'ratio':>7}")
    for name, shape in (SHAPES | {"DeepSeek-V3": DEEPSEEK_V3}).items():
        value = shape.v_head_dim if shape.family.attention == "latent" else shape.head_dim
        per_head = 2 * shape.num_hidden_layers * (shape.qk_head_dim + value)
        ours, heads, groups = (
            2 * shape.num_hidden_layers * shape.cache_width,
            shape.num_attention_heads * per_head,
            8 * per_head,
        )
        print(f"{name:<28}{ours:>10}{heads:>11}{heads / ours:>7.1f}{groups:>10}{groups / ours:>7.1f}")
        for kind, theirs in (("all_heads", heads), ("8_groups", groups)):
            rows.append(
                {"name": f"cache/{name}/{kind}", "ours": ours, "peer": theirs, "ratio": round(theirs / ours, 3)}
            )
    return [row | {"unit": "bytes a token", "machine": "any", "versions": {}} for row in rows]


def our_pass(policy: Policy, ids_BS: Tensor, kind: Recomputation) -> Callable[[], float]:
    """Forward, log-probabilities, backward, over all rows at once."""
    rows = PackedRows.of([ids_BS.shape[1]] * len(ids_BS), ids_BS.device)
    return _pass_over(policy, ids_BS.flatten(), rows, kind)


def ragged_pass(policy: Policy, ids_BS: Tensor) -> Callable[[], float]:
    """The same tokens in rows from a quarter to seven quarters of the length."""
    count, length = ids_BS.shape
    lengths = [length * (1 + 6 * i // max(1, count - 1)) // 4 for i in range(count)]
    lengths[-1] += ids_BS.numel() - sum(lengths)
    return _pass_over(policy, ids_BS.flatten(), PackedRows.of(lengths, ids_BS.device), "none")


def _pass_over(policy: Policy, ids_N: Tensor, rows: PackedRows, kind: Recomputation) -> Callable[[], float]:
    wanted_N = rows.position_ids_N > 0

    def run() -> float:
        policy.zero_grad(set_to_none=True)
        policy.recomputation = kind
        loss = -token_logprobs(policy, ids_N, rows, wanted_N).logprobs_N.sum() / (len(ids_N) - len(rows.lengths))
        loss.backward()
        return float(loss.detach())

    return run


def measure_peers(folder: str, ids_BS: Tensor, dtype: torch.dtype, arguments: argparse.Namespace) -> Iterator[Measured]:
    """Every way that works: attention, experts, rows at a time; Liger's kernels where they are installed."""
    is_moe = (Path(folder) / "config.json").read_text().find("n_routed_experts") >= 0
    for attention in arguments.peer_attention:
        if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            print("not installed: flash_attn")
            continue
        for experts in arguments.peer_experts if is_moe else [None]:
            model = load_peer(folder, dtype, str(ids_BS.device.type), attention, experts)
            for at_once in arguments.peer_rows:
                name = f"transformers {attention} {experts or ''} {at_once} rows at a time"
                try:
                    yield measure(name, peer_pass(model, ids_BS, at_once), arguments.rounds)
                except torch.OutOfMemoryError:
                    print(f"out of memory: {name}")
                if experts in ("batched_mm", "eager") or attention == "flex_attention":
                    break
            del model
            gc.collect()
            torch.cuda.empty_cache()


def load_peer(folder: str, dtype: torch.dtype, device: str, attention: str, experts: str | None) -> Any:
    """The same weights in transformers."""
    options = {"experts_implementation": experts} if experts else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **options)
    return model.to(device).train()


def peer_pass(model: Any, ids_BS: Tensor, at_once: int) -> Callable[[], float]:
    """The same with transformers, some rows at a time; cross-entropy of fp32 logits is what it does itself."""
    count = ids_BS.numel() - len(ids_BS)

    def run() -> float:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for part_BS in ids_BS.split(at_once):
            logits = model(part_BS, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            logprobs = -F.cross_entropy(logits, part_BS[:, 1:].flatten(), reduction="none")
            del logits
            loss = -logprobs.sum() / count
            loss.backward()
            total += float(loss.detach())
        return total

    return run


def measure(name: str, run: Callable[[], float], rounds: int) -> Measured:
    """Two passes uncounted, then the median and the peak of the timed ones."""
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        gc.collect()
        torch.cuda.empty_cache()  # what one way left behind in pieces must not cost the next one time
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    run()
    if is_gpu:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        loss = run()  # reads the loss, so that the GPU is done
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else 0.0
    return Measured(name=name, seconds=statistics.median(times), first_seconds=first, peak_gib=peak, loss=loss)


def matmul_rate(device: str) -> float:
    """Operations a second of a large bf16 product (a small fp32 one on the CPU)."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16 if device == "cuda" else None) for _ in range(2))
    for _ in range(3):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def print_profile(run: Callable[[], float]) -> None:
    """The kernels that take most of a pass."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        run()
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70))


def as_rows(name: str, ours: Measured, peer: Measured) -> Sequence[dict[str, Any]]:
    """Time and memory, for JSON."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    pairs = ((1e3 * ours.seconds, 1e3 * peer.seconds, "ms"), (ours.peak_gib, peer.peak_gib, "GiB at most"))
    return [
        {
            "name": name,
            "ours": round(mine, 3),
            "peer": round(theirs, 3),
            "ratio": round(theirs / mine, 3) if mine else None,
            "unit": unit,
            "peer_name": peer.name,
            "machine": machine(),
            "versions": versions,
        }
        for mine, theirs, unit in pairs
    ]


def machine() -> str:
    """The GPU's name, else the processor's kind."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


if __name__ == "__main__":
    main()
