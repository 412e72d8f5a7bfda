"""What both vLLM engines must do, as checks that their tests call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from policy import Policy
from policy.tokenizer import Tokenizer
from rollouts import Completion, Engine, EngineConfig, SamplingParams, make_engine
from tests.rollouts.agreement import recorded_and_trained

SERVABLE: dict[str, object] = {
    "hidden_size": 32, "moe_intermediate_size": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
"""Widths that vLLM has on a CPU: heads of 32 and more; experts whose widths 32 divides, to be reloaded."""
PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [12, 4], list(range(10, 42))]


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[list(completion.token_ids) for completion in group] for group in groups]


def check_greedy(engine: Engine, policy: Policy, version: int) -> None:
    """The built-in engine's tokens, under the policy's weights as they are now."""
    params = SamplingParams(max_completion_length=16, temperature=0)
    groups = engine.generate(PROMPTS, 2, params)
    assert tokens(groups) == tokens(make_engine(policy, EngineConfig()).generate(PROMPTS, 2, params))
    assert {x for group in groups for c in group for x in c.logprobs} == {0.0}
    assert {c.policy_version for group in groups for c in group} == {version}


def check_logprobs(engine: Engine, policy: Policy) -> None:
    """Those recorded are the trainer's, of the distribution that was sampled, to 4e-4.

    Either side may be 1.5e-4 off what fp64 gives: the weights of these policies are large.
    """
    params = SamplingParams(max_completion_length=24, temperature=0.8, stop_token_ids=(2, 9), seed=1)
    groups = engine.generate(PROMPTS, 4, params)
    sampled, trained = recorded_and_trained(policy, PROMPTS, groups, temperature=0.8)
    assert (trained - sampled).abs().max() < 4e-4
    for c in (completion for group in groups for completion in group):
        stopped = [token in params.stop_token_ids for token in c.token_ids]
        assert stopped == [False] * (len(stopped) - 1) + [c.finish_reason == "stop"]
        assert c.finish_reason == "stop" or len(stopped) == params.max_completion_length
    assert {c.finish_reason for group in groups for c in group} == {"stop", "length"}


@torch.no_grad()
def regrets(policy: Policy, prompts: Sequence[Sequence[int]], groups: list[list[Completion]]) -> Tensor:
    """By how many standard deviations of the trainer's logits each completion token falls short of the largest."""
    short = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            row = torch.tensor([[*prompt, *completion.token_ids]], device=policy.device)
            logits_TV, chosen_T = policy.logits(row)[0, len(prompt) - 1 : -1], row[0, len(prompt) :]
            largest_T = logits_TV.max(dim=-1).values
            short.append((largest_T - logits_TV.gather(1, chosen_T[:, None])[:, 0]) / logits_TV.std(dim=-1))
    return torch.cat(short)


def check_bf16(engine: Engine, policy: Policy, stale: Policy, version: int) -> dict[str, float]:
    """As `check_greedy`, `check_logprobs` and `check_truncation`, so far as bf16 allows; gives what was measured.

    Two ways of computing differ by some hundredths of the logits' spread, so that nearly all tokens are the trainer's
    choice and the others nearly. Under other weights they would be anything.
    """
    alone: tuple[dict[str, float], ...] = ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999999})
    found = {"same_choice": 1.0, "worst_choice": 0.0}
    for settings in alone:
        params = SamplingParams(max_completion_length=24, **settings)  # type: ignore[arg-type]
        groups = engine.generate(PROMPTS, 2, params)
        assert {c.policy_version for group in groups for c in group} == {version}
        short = regrets(policy, PROMPTS, groups)
        found["same_choice"] = min(found["same_choice"], float((short == 0).float().mean()))
        found["worst_choice"] = max(found["worst_choice"], float(short.max()))
        found["other_weights"] = float(regrets(stale, PROMPTS, groups).mean())
        assert found["same_choice"] > 0.8, (settings, found)
        assert found["worst_choice"] < 0.5, (settings, found)
        assert found["other_weights"] > 0.5, (settings, found)
    groups = engine.generate(PROMPTS, 8, SamplingParams(max_completion_length=24, temperature=0.8, seed=1))
    for name, weights in (("difference", policy), ("other_difference", stale)):
        sampled, trained = recorded_and_trained(weights, PROMPTS, groups, temperature=0.8)
        found[name], found[f"{name}_max"] = (float(f((trained - sampled).abs())) for f in (torch.mean, torch.max))
    assert found["difference"] < 0.1, found
    assert found["other_difference"] > 0.3, found
    return found


def check_truncation(engine: Engine) -> None:
    """top_k, top_p and min_p reach vLLM: whichever leaves one token gives the greedy ones, each with certainty."""
    greedy = tokens(engine.generate(PROMPTS, 1, SamplingParams(max_completion_length=8, temperature=0)))
    for alone in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999999}):
        groups = engine.generate(PROMPTS, 1, SamplingParams(max_completion_length=8, **alone))
        assert tokens(groups) == greedy
        assert {x for group in groups for c in group for x in c.logprobs} == {0.0}


def check_stop_strings(engine: Engine, policy: Policy, tokenizer: Tokenizer) -> None:
    """Texts end completions where they end those of the built-in engine; the engine must have the same tokenizer."""
    params = SamplingParams(max_completion_length=16, temperature=0)
    texts = [tokenizer.decode_after_text(c.token_ids) for group in engine.generate(PROMPTS, 1, params) for c in group]
    middles = {text[at : at + 5] for text in texts for at in (3, len(text) // 2)} - {""}
    beginning = texts[0][:2]
    assert beginning.startswith(" ")
    strings = (beginning, *sorted(middles)[::2])
    params = replace(params, stop_strings=strings)
    groups = engine.generate(PROMPTS, 1, params)
    wanted = make_engine(policy, EngineConfig(), tokenizer).generate(PROMPTS, 1, params)
    assert tokens(groups) == tokens(wanted)
    assert len(tokenizer.decode_after_text(groups[0][0].token_ids).split()) == 1
    reasons = [c.finish_reason for group in groups for c in group]
    assert reasons == [c.finish_reason for group in wanted for c in group]
    assert "stop" in reasons
    assert all(len(c.logprobs) == len(c.token_ids) for group in groups for c in group)


def check_seeds(engine: Engine) -> None:
    """One seed, one completion, whatever is sampled beside it; another seed, another; every one of a group its own."""
    params = SamplingParams(max_completion_length=16, seed=5)
    seeds = [10, 2**63 + 11, 2**64 - 1, 13, 2**53 + 1]
    first = tokens(engine.generate(PROMPTS, 3, params, seeds))
    assert tokens(engine.generate(PROMPTS[::-1], 3, params, seeds[::-1]))[::-1] == first
    assert tokens(engine.generate(PROMPTS[:1], 3, params, seeds[:1])) == first[:1]
    assert tokens(engine.generate(PROMPTS, 3, params)) == tokens(engine.generate(PROMPTS, 3, params)) != first
    assert all(len({tuple(completion) for completion in group}) == 3 for group in first)


def check_groups_are_told(engine: Engine) -> None:
    """Each prompt once, with what is returned; what is raised there ends the call, and no other."""
    params, told = (
        SamplingParams(max_completion_length=16, stop_token_ids=(2, 9), seed=4),
        dict[int, list[Completion]](),
    )

    def note(place: int, completions: list[Completion]) -> None:
        assert place not in told
        told[place] = completions

    def refuse(place: int, completions: list[Completion]) -> None:
        raise ZeroDivisionError

    groups = engine.generate(PROMPTS, 3, params, on_group=note)
    assert [told[place] for place in range(len(PROMPTS))] == groups
    try:
        engine.generate(PROMPTS, 3, params, on_group=refuse)
    except ZeroDivisionError:
        assert tokens(engine.generate(PROMPTS, 3, params)) == tokens(groups)
    else:
        raise AssertionError("an error was swallowed")
