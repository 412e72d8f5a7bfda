"""Routing replay: an update sends tokens to the experts that they went to before, and teaches these alone.

In bf16 a near tie between two experts falls one way in the sampler and the other in the trainer, and a step of the
optimizer moves ties of its own: the ratio of the loss then compares two different subnetworks. Replayed are the experts
of the sampler ("Keep Routing", DeepSeek-V3.2, arXiv 2512.02556, section 3.1; R3, arXiv 2510.11370) or those of the
pass that computes the old log-probabilities (GSPO, arXiv 2507.18071, section 5.3). MTP modules route on their own, and
so does the reference.

Shapes: N packed tokens, S prompt tokens, T completion tokens, M layers with routed experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from policy import Policy
from rollouts import Completion

OWN_CHOICE = -1
"""In the place of an expert: the router chooses."""


def pack_experts(rows: Sequence[tuple[int, Completion]]) -> Tensor | None:
    """Experts of packed rows, int16 [N, M, K]: each row a number of prompt tokens and the completion after them.

    The last token of a completion was never fed to the sampler, and a completion may have no record; there the routers
    choose. None where no completion has one.
    """
    recorded = [c for _, c in rows if c.experts_MTK is not None]
    if not recorded:
        return None
    num_layers, _, per_token = recorded[0].experts_MTK.shape  # type: ignore[union-attr]
    packed = np.full(
        (sum(prompt + len(c.token_ids) for prompt, c in rows), num_layers, per_token), OWN_CHOICE, dtype=np.int16
    )
    start = 0
    for prompt, completion in rows:
        if completion.experts_MTK is not None and completion.prompt_experts_MSK is not None:
            middle, end = start + prompt, start + prompt + completion.experts_MTK.shape[1]
            packed[start:middle] = completion.prompt_experts_MSK.transpose(1, 0, 2)
            packed[middle:end] = completion.experts_MTK.transpose(1, 0, 2)
        start += prompt + len(completion.token_ids)
    return torch.from_numpy(packed)


def as_given(experts_MNK: Tensor) -> Tensor:
    """The experts of a pass as a batch holds them, int16 [N, M, K]."""
    return experts_MNK.transpose(0, 1).to(torch.int16)


def differing_tokens(experts_NMK: Tensor, preferred_MNK: Tensor) -> Tensor:
    """True [N] at tokens whose routers would have chosen another set of experts in some layer than was given.

    A layer is asked after the layers below have followed what was given; where nothing was given it agrees.
    """
    given_NMK, preferred_NMK = experts_NMK.long(), preferred_MNK.transpose(0, 1)
    given_NMK = torch.where(given_NMK < 0, preferred_NMK, given_NMK)
    return (given_NMK.sort(dim=-1).values != preferred_NMK.sort(dim=-1).values).flatten(1).any(dim=1)


def freeze_routers(policy: Policy) -> None:
    """Let no update move the routers' weights, those of MTP modules included; biases move by balancing alone."""
    for layer in (*policy.moe_layers, *policy.mtp_moe_layers):
        layer.gate.weight.requires_grad_(False)
