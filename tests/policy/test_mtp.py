"""The MTP loss worked from its definition (DeepSeek-V3, equations 21 to 25), one row and one index at a time."""

import pytest
import torch
from torch import Tensor

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.logprobs import ahead_losses, next_token_loss
from policy.packing import Wanted
from policy.paged_attention import Absorbed
from policy.rope import rotation_of
from tests.policies import tiny_policy

LENGTHS = (9, 4, 2, 1, 3, 6)


def make_policy(depth: int = 2) -> Policy:
    return tiny_policy(num_nextn_predict_layers=depth)


def draw_tokens(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.randint(3, 61, (sum(lengths),), generator=torch.Generator().manual_seed(0))


def mtp_losses_by_definition(policy: Policy, token_ids_N: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """L_MTP^k for k = 1..D; t[i] are a row's tokens and h[i] their hidden states, counted from 0.

    As in the trunk, what leaves a module has gone through its final norm.
    """
    terms: list[list[Tensor]] = [[] for _ in policy.mtp]
    for t in token_ids_N.split(lengths):
        rows = PackedRows.of([len(t)])
        h = policy(t, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
        for k, module in enumerate(policy.mtp, start=1):
            count = len(t) - k
            if count < 1:
                break
            joined = []
            for i in range(count):
                embedding, state = module.enorm(policy.embed_tokens.weight[t[i + k]]), module.hnorm(h[i])
                joined.append(module.eh_proj(torch.cat((embedding, state))))  # equation 21
            rows = PackedRows.of([count])
            rotation = rotation_of(torch.arange(count), policy.config)
            h = module.norm(module.block(torch.stack(joined), rotation, Expanded(rows=rows))[0])  # equation 22
            for i in range(count - 1):
                logits_V = policy.lm_head.weight @ h[i]  # equation 23
                terms[k - 1].append(-logits_V.log_softmax(-1)[t[i + k + 1]])
    return [torch.stack(each).mean() for each in terms]  # equation 24, as a mean over the tokens that are predicted


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_loss_equals_the_definition_gradients_too(depth: int) -> None:
    policy, token_ids_N = make_policy(depth), draw_tokens()
    ours = next_token_loss(policy, token_ids_N, PackedRows.of(LENGTHS), mtp_weight=0.3)
    losses = mtp_losses_by_definition(policy, token_ids_N, LENGTHS)
    assert len(losses) == depth
    trunk = next_token_loss(policy, token_ids_N, PackedRows.of(LENGTHS)).total
    wanted = trunk + 0.3 / depth * torch.stack(losses).sum()  # equation 25
    assert torch.allclose(ours.mtp, torch.stack(losses).mean(), atol=1e-5)
    assert torch.allclose(ours.total, wanted, atol=1e-5)
    assert torch.allclose(ours.trunk, trunk)
    parameters = list(policy.parameters())
    for a, b in zip(torch.autograd.grad(ours.total, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_weight_zero_leaves_the_modules_out() -> None:
    policy = make_policy()
    loss = next_token_loss(policy, draw_tokens(), PackedRows.of(LENGTHS), mtp_weight=0.0)
    loss.total.backward()
    assert float(loss.mtp) == 0
    assert all(weight.grad is None for weight in policy.mtp.parameters())


def test_what_follows_in_other_rows_changes_nothing() -> None:
    """Positions near a row's end look into the next row when tokens are rolled; they must not count."""
    policy, lengths = make_policy(), (4, 5)
    token_ids_N = draw_tokens(lengths)
    both = next_token_loss(policy, token_ids_N, PackedRows.of(lengths), mtp_weight=1.0)
    parts = [
        next_token_loss(policy, row, PackedRows.of([len(row)]), mtp_weight=1.0) for row in token_ids_N.split(lengths)
    ]
    # By row length T: T - 1 tokens count for the trunk, T - 2 and T - 3 for the two modules.
    trunk = (3 * parts[0].trunk + 4 * parts[1].trunk) / 7
    losses = [mtp_losses_by_definition(policy, row, (len(row),)) for row in token_ids_N.split(lengths)]
    mtp = ((2 * losses[0][0] + 3 * losses[1][0]) / 5 + (1 * losses[0][1] + 2 * losses[1][1]) / 3) / 2
    assert torch.allclose(both.trunk, trunk, atol=1e-5)
    assert torch.allclose(both.mtp, mtp, atol=1e-5)


def test_rows_too_short_to_predict_ahead_add_nothing() -> None:
    policy, lengths = make_policy(), (2, 1, 2)
    loss = next_token_loss(policy, draw_tokens(lengths), PackedRows.of(lengths), mtp_weight=0.5)
    assert float(loss.mtp) == 0
    assert torch.equal(loss.total.detach(), loss.trunk)
    assert loss.trunk > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_detached_modules_learn_as_before_and_teach_nobody_else(depth: int) -> None:
    policy, token_ids_N, rows = make_policy(depth), draw_tokens(), PackedRows.of(LENGTHS)
    own = {name for name, _ in policy.named_parameters() if name.startswith("mtp.")}

    def gradients(*, is_detached: bool) -> dict[str, Tensor]:
        policy.zero_grad(set_to_none=True)
        hidden_NC = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
        torch.stack(ahead_losses(policy, hidden_NC, token_ids_N, rows, is_detached=is_detached).sums).sum().backward()
        return {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}

    attached, detached = gradients(is_detached=False), gradients(is_detached=True)
    assert {"embed_tokens.weight", "lm_head.weight", "layers.0.mlp.up_proj.weight"} < attached.keys() - own
    assert detached.keys() == own
    assert all(torch.equal(attached[name], detached[name]) for name in own)


def test_wanted_tokens_and_temperature_of_the_modules_losses() -> None:
    policy, token_ids_N, rows = make_policy(), draw_tokens(), PackedRows.of(LENGTHS)
    hidden_NC = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
    outputs = policy.predict_ahead(hidden_NC, token_ids_N.roll(-1), rows)
    wanted_N = torch.rand(len(token_ids_N), generator=torch.Generator().manual_seed(2)) < 0.6
    wanted_N &= rows.position_ids_N > 0
    losses = ahead_losses(policy, hidden_NC, token_ids_N, rows, wanted=Wanted.of(wanted_N, rows), temperature=0.7)
    for k, output in enumerate(outputs):
        log_all_NV = (policy.project(output.hidden_NC) / 0.7).log_softmax(-1)
        targets = [n for n, p in enumerate(rows.position_ids_N.tolist()) if wanted_N[n] and p >= k + 2]
        assert losses.counts[k] == len(targets) > 0
        wanted = -sum(log_all_NV[n - k - 2, token_ids_N[n]] for n in targets)
        assert torch.allclose(losses.sums[k], torch.as_tensor(wanted), rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_the_last_module_goes_on_from_its_own_output(depth: int) -> None:
    """Row by row, with the state that it gave at one position put in for the trunk's at the next."""
    policy, token_ids_N, rows = make_policy(depth), draw_tokens(), PackedRows.of(LENGTHS)
    hidden_NC = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
    outputs = policy.predict_ahead(hidden_NC, token_ids_N.roll(-1), rows, num_recycled=2)
    plain = policy.predict_ahead(hidden_NC, token_ids_N.roll(-1), rows)
    assert len(outputs) == depth + 2
    assert all(torch.equal(a.hidden_NC, b.hidden_NC) for a, b in zip(outputs, plain, strict=False))
    losses = ahead_losses(policy, hidden_NC, token_ids_N, rows, num_recycled=2)
    totals = [0.0, 0.0]
    for start, length in zip(rows.starts, LENGTHS, strict=True):
        if length == 1:
            continue
        tokens_S, one = token_ids_N[start : start + length], PackedRows.of([length])
        taken_SC = hidden_NC[start : start + length] if depth == 1 else outputs[0].hidden_NC[start : start + length]
        given_SC = outputs[depth - 1].hidden_NC[start : start + length]
        for recycled in range(2):
            taken_SC = torch.cat((taken_SC[:1], given_SC[:-1]))
            ahead_SC = policy.embed_tokens(tokens_S.roll(-depth))
            rotation = rotation_of(one.position_ids_N, policy.config)
            given_SC, _ = policy.mtp[-1](taken_SC, ahead_SC, rotation, Expanded(rows=one))
            # What lies at a row's last positions looked at tokens beyond it.
            known = slice(start, start + length - depth)
            assert torch.allclose(outputs[depth + recycled].hidden_NC[known], given_SC[: length - depth], atol=1e-5)
            log_all_SV = policy.project(given_SC).log_softmax(-1)
            wanted = range(depth + recycled + 2, length)
            totals[recycled] -= sum(float(log_all_SV[n - depth - 1, tokens_S[n]]) for n in wanted)
    assert [float(total) for total in losses.sums[depth:]] == pytest.approx(totals, rel=1e-5)
    assert losses.counts[depth:] == [sum(max(0, n - depth - 2 - r) for n in LENGTHS) for r in range(2)]


BLOCK = 3


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("shape", [{}, {"q_lora_rank": 24}], ids=["plain", "query_latent"])
@torch.no_grad()
def test_drafting_over_the_cache_equals_predicting_ahead_on_the_whole_row(depth: int, shape: dict[str, object]) -> None:
    """Prompts are prefilled in packed rows, in the trunk and then in the modules; the rest goes token by token."""
    policy = tiny_policy(num_nextn_predict_layers=depth, **shape)
    config, lengths, prompts = policy.config, [14, 9, 6], [5, 6, 3]
    sequences = draw_tokens(tuple(lengths)).split(lengths)
    wanted = []
    for token_ids_S in sequences:
        rows = PackedRows.of([len(token_ids_S)])
        hidden_SC = policy(token_ids_S, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
        wanted.append([each.hidden_NC for each in policy.predict_ahead(hidden_SC, token_ids_S.roll(-1), rows)])

    tables = torch.randperm(15, generator=torch.Generator().manual_seed(0)).view(3, 5)
    assert config.num_cache_layers == config.num_hidden_layers + depth
    cache = torch.full((config.num_cache_layers, 15, BLOCK, config.cache_width), 100.0)

    def slots(b: int, positions: range) -> list[int]:
        return [int(tables[b, p // BLOCK]) * BLOCK + p % BLOCK for p in positions]

    rows = PackedRows.of(prompts)
    plan: Expanded | Absorbed = Expanded(
        rows=rows, cache=cache, slot_N=torch.tensor([s for b, n in enumerate(prompts) for s in slots(b, range(n))])
    )
    token_ids_N = torch.cat([row[:n] for row, n in zip(sequences, prompts, strict=True)])
    hidden_NC = policy(token_ids_N, rows.position_ids_N, plan).hidden_NC
    got: list[list[list[Tensor]]] = [[[] for _ in range(depth)] for _ in sequences]
    for k in range(depth):
        ahead_N = torch.cat([row[k + 1 : n + k + 1] for row, n in zip(sequences, prompts, strict=True)])
        hidden_NC = policy.draft(hidden_NC, ahead_N, rows.position_ids_N, plan, module=k).hidden_NC
        for b, part in enumerate(hidden_NC.split(prompts)):
            got[b][k] += list(part)
    for step in range(max(lengths)):
        # The last `depth` tokens of a sequence have no further ones to feed to the modules.
        live = [b for b, n in enumerate(prompts) if n + step + depth < lengths[b]]
        if not live:
            break
        positions_B = torch.tensor([prompts[b] + step for b in live])
        plan = Absorbed.at(cache, tables[live], positions_B)
        tokens = [[sequences[b][prompts[b] + step + ahead] for b in live] for ahead in range(depth + 1)]
        hidden_BC = policy(torch.tensor(tokens[0]), positions_B, plan).hidden_NC
        for k in range(depth):
            hidden_BC = policy.draft(hidden_BC, torch.tensor(tokens[k + 1]), positions_B, plan, module=k).hidden_NC
            for b, hidden_C in zip(live, hidden_BC, strict=True):
                got[b][k].append(hidden_C)
    for ours, theirs, length in zip(got, wanted, lengths, strict=True):
        for of_module, whole_SC in zip(ours, theirs, strict=True):
            assert len(of_module) == length - depth
            assert (torch.stack(of_module) - whole_SC[: length - depth]).abs().max() < 1e-5
