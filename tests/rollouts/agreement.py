"""What an engine recorded beside what the trainer makes of the same completions.

Shapes: N packed tokens, T completion tokens of all completions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from policy import PackedRows, Policy
from policy.logprobs import token_logprobs
from rollouts import Completion


@torch.no_grad()
def recorded_and_trained(
    policy: Policy, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T] of all completion tokens in order: the engine's, and the trainer's from whole rows."""
    rows = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    packed = PackedRows.of([len(p) + len(c.token_ids) for p, c in rows], policy.device)
    token_ids_N = torch.tensor([t for p, c in rows for t in (*p, *c.token_ids)], device=policy.device)
    wanted = [x for p, c in rows for x in [False] * len(p) + [True] * len(c.token_ids)]
    wanted_N = torch.tensor(wanted, device=policy.device)
    trained = token_logprobs(policy, token_ids_N, packed, wanted_N, temperature=temperature).logprobs_N[wanted_N]
    return torch.tensor([x for _, c in rows for x in c.logprobs], device=policy.device), trained
