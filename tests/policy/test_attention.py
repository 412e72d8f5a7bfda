"""Attention over a paged cache and over rows; fused and plain; packed and alone.

Shapes: N packed tokens, B sequences, H heads, G key-value heads, S positions, Q query width, V value width, W cache
width.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policy import PackedRows, Policy
from policy.attention import SHORT_ROW, Expanded, attend_causally, attend_in_rows
from policy.gpu_attention import Kernel, Pairing, attend_after_prefixes
from policy.paged_attention import Absorbed
from tests.policies import tiny_llama, tiny_policy

BLOCK = 3
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "query_latent": {"q_lora_rank": 24},
    "one_head_all_dense": {"num_attention_heads": 1, "first_k_dense_replace": 3},
    "grouped_query": {"model_type": "llama"},
    "one_key_for_all": {"model_type": "qwen3", "num_key_value_heads": 1, "attention_bias": True},
}


def make(shape: str) -> Policy:
    return tiny_llama(**SHAPES[shape]) if "model_type" in SHAPES[shape] else tiny_policy(**SHAPES[shape])


def hidden_of_row(policy: Policy, token_ids: Sequence[int]) -> Tensor:
    """[S, C] of one row by itself."""
    rows = PackedRows.of([len(token_ids)])
    hidden: Tensor = policy(torch.tensor(token_ids), rows.position_ids_N, Expanded(rows=rows)).hidden_NC
    return hidden


def flat_slots(table: np.ndarray, positions: Sequence[int]) -> list[int]:
    return [int(table[p // BLOCK]) * BLOCK + p % BLOCK for p in positions]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_absorbed_decoding_over_the_cache_equals_the_expanded_forward(shape: str) -> None:
    policy = make(shape)
    config, rng = policy.config, np.random.default_rng(0)
    sequences = [rng.integers(3, 61, length).tolist() for length in (14, 2, 23, 9, 3)]
    prompts = [5, 1, 6, 3, 3]  # shorter than a block, whole blocks, and one sequence that is all prompt
    wanted = [hidden_of_row(policy, token_ids) for token_ids in sequences]
    # Blocks in random order; what was in the cache before is large, so that reading beyond a sequence would show.
    most = 23 // BLOCK + 1
    tables = rng.permutation(len(sequences) * most).reshape(len(sequences), most)
    cache = 100 * torch.randn(config.num_hidden_layers, tables.size, BLOCK, config.cache_width)

    rows = PackedRows.of(prompts)
    slots = [slot for table, n in zip(tables, prompts, strict=True) for slot in flat_slots(table, range(n))]
    prompt_ids = torch.tensor([t for s, n in zip(sequences, prompts, strict=True) for t in s[:n]])
    plan = Expanded(rows=rows, cache=cache, slot_N=torch.tensor(slots))
    prefilled = policy(prompt_ids, rows.position_ids_N, plan).hidden_NC.split(prompts)
    got = [list(row) for row in prefilled]
    for step in range(max(map(len, sequences))):
        live = [b for b, n in enumerate(prompts) if n + step < len(sequences[b])]
        if not live:
            break
        positions = [prompts[b] + step for b in live]
        absorbed = Absorbed.at(cache, torch.from_numpy(tables[live]), torch.tensor(positions))
        tokens = torch.tensor([sequences[b][p] for b, p in zip(live, positions, strict=True)])
        for b, hidden_C in zip(live, policy(tokens, torch.tensor(positions), absorbed).hidden_NC, strict=True):
            got[b].append(hidden_C)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (torch.stack(ours) - theirs).abs().max() < 1e-5


def attend_in_loops(query_SQ: Tensor, key_SQ: Tensor, value_SV: Tensor, scale: float) -> Tensor:
    """Softmax attention of one head by its definition, in fp64."""
    out = []
    for i in range(len(query_SQ)):
        weights = (key_SQ[: i + 1].double() @ query_SQ[i].double() * scale).exp()
        out.append(weights @ value_SV[: i + 1].double() / weights.sum())
    return torch.stack(out).float()


def draw_heads(length: int, groups: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, 6, length, 20), (2, groups, length, 20), (2, groups, length, 10))
    query, key, value = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("length", [1, 2, 31, SHORT_ROW, SHORT_ROW + 1])
def test_causal_attention_equals_its_definition_on_both_sides_of_short_row(length: int, groups: int) -> None:
    query, key, value = draw_heads(length, groups)
    out = attend_causally(query, key, value, 0.3)
    for b, h in ((0, 0), (1, 2), (1, 5)):
        g = h * groups // 6
        assert torch.allclose(out[b, h], attend_in_loops(query[b, h], key[b, g], value[b, g], 0.3), atol=1e-5)


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("length", [1, 2, 31, SHORT_ROW])
def test_products_of_short_rows_equal_the_fused_kernel(length: int, groups: int) -> None:
    def fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups < 6)

    def run(attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> list[Tensor]:
        heads = draw_heads(length, groups)
        out = attend(*heads, 0.3)
        return [out, *torch.autograd.grad(out.square().sum(), heads)]

    for ours, theirs in zip(run(attend_causally), run(fused), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [(5, 1, 9, 3), (4, 4, 4)], ids=["ragged", "equal"])
def test_packed_rows_equal_each_row_alone_gradients_too(shape: str, lengths: tuple[int, ...]) -> None:
    policy = make(shape)
    token_ids_N = torch.randint(3, 61, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    rows = PackedRows.of(lengths)
    together = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
    alone = torch.cat([hidden_of_row(policy, row.tolist()) for row in token_ids_N.split(lengths)])
    assert (together - alone).abs().max() < 1e-5

    direction = torch.randn(together.shape, generator=torch.Generator().manual_seed(2))
    used = [weight for name, weight in policy.named_parameters() if not name.startswith("lm_head")]
    for a, b in zip(
        torch.autograd.grad((together * direction).sum(), used),
        torch.autograd.grad((alone * direction).sum(), used),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def attend_pairs(query: Tensor, key: Tensor, value: Tensor, pairs: Pairing, scale: float) -> tuple[Tensor, Tensor]:
    """What a GPU's kernel gives, by the definition."""
    outs, totals = [], []
    for q, k, v in zip(
        query.tensor_split(pairs.query_bounds[1:-1].tolist()),
        key.tensor_split(pairs.key_bounds[1:-1].tolist()),
        value.tensor_split(pairs.key_bounds[1:-1].tolist()),
        strict=True,
    ):
        times = query.shape[1] // key.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(times, 1)) * scale
        if pairs.is_causal:
            scores = scores.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(times, 1)))
        totals.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(totals, dim=1)


def gradients_of_pairs(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, pairs: Pairing, scale: float
) -> tuple[Tensor, ...]:
    """FlashAttention-2's backward pass (Dao, 2023, algorithm 2) without its tiles: weights from the given total."""
    found: list[list[Tensor]] = [[], [], []]
    starts, key_starts = pairs.query_bounds.tolist(), pairs.key_bounds.tolist()
    times, groups = query.shape[1] // key.shape[1], key.shape[1]
    for piece in range(len(starts) - 1):
        at, of = slice(*starts[piece : piece + 2]), slice(*key_starts[piece : piece + 2])
        k, v = (x[of].repeat_interleave(times, 1) for x in (key, value))
        weights = (torch.einsum("qhd,khd->hqk", query[at], k) * scale - total[:, at, None]).exp()
        if pairs.is_causal:
            weights = weights.tril()
        towards = torch.einsum("qhd,khd->hqk", grad[at], v) - (grad[at] * out[at]).sum(-1).t()[..., None]
        scores_grad = weights * towards * scale
        found[0].append(torch.einsum("hqk,khd->qhd", scores_grad, k))
        found[1].append(torch.einsum("hqk,qhd->khd", scores_grad, query[at]).unflatten(1, (groups, times)).sum(2))
        found[2].append(torch.einsum("hqk,qhd->khd", weights, grad[at]).unflatten(1, (groups, times)).sum(2))
    return tuple(torch.cat(parts) for parts in found)


PLAIN = Kernel(attend=attend_pairs, gradients=gradients_of_pairs)  # type: ignore[arg-type]

LONG = SHORT_ROW + 40


@pytest.mark.parametrize("in_pieces", [False, True], ids=["padded", "joined pieces"])
@pytest.mark.parametrize(
    ("prefixes", "rests"),
    [((3, 3), ((0, 2), (0, 5), (1, 1))), ((1, 6), ((0, 4), (1, 3), (1, 30))), ((LONG, 9), ((0, 7), (1, LONG)))],
    ids=["equal prefixes", "unequal", "long"],
)
@pytest.mark.parametrize(("groups", "width", "value_width"), [(4, 6, 6), (2, 6, 6), (4, 6, 4)])
def test_attention_after_a_shared_prefix_equals_that_of_whole_rows(
    groups: int,
    width: int,
    value_width: int,
    prefixes: tuple[int, ...],
    rests: tuple[tuple[int, int], ...],
    in_pieces: bool,
) -> None:
    rows = PackedRows.of(
        [prefixes[f] + rest for f, rest in rests], prefixes=prefixes, prefix_of_row=[f for f, _ in rests]
    )
    shared, generator = rows.shared, torch.Generator().manual_seed(0)
    assert shared is not None
    shapes = ((4, width), (groups, width), (groups, value_width), (4, value_width))
    *inputs, grad = (torch.randn(len(shared.token_U), *shape, generator=generator).double() for shape in shapes)
    inputs = [x.requires_grad_() for x in inputs]
    ours = attend_after_prefixes(*inputs, shared, 0.3, PLAIN) if in_pieces else attend_in_rows(*inputs, rows, 0.3)
    whole = attend_in_rows(*(x.index_select(0, shared.place_N) for x in inputs), rows.alone, 0.3)
    wanted = whole.index_select(0, shared.token_U)
    assert torch.allclose(ours, wanted, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
