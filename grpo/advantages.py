"""Advantages of a group's completions from their rewards, without a critic. Pure functions.

Shapes: G completions of one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

VARIANCE_TOLERANCE = 1e-6
"""A group whose rewards spread less than this carries no signal: all its advantages are 0, so that rounding cannot
make a
spike out of a constant group."""


def standardised(rewards_G: Tensor) -> Tensor:
    """(r - mean) / std over the group, with the sample standard deviation (DeepSeekMath, section 4.1.2: GRPO)."""
    centred_G = centred(rewards_G)
    spread = rewards_G.std() if len(rewards_G) > 1 else torch.zeros(())
    return centred_G / spread if spread > VARIANCE_TOLERANCE else centred_G


def centred(rewards_G: Tensor) -> Tensor:
    """r - mean over the group (Dr. GRPO, section 3: dividing by the spread favours easy and hard problems)."""
    centred_G = rewards_G - rewards_G.mean()
    return centred_G if centred_G.abs().max() > VARIANCE_TOLERANCE else torch.zeros_like(rewards_G)


SCALINGS: Mapping[str, Callable[[Tensor], Tensor]] = {"group": standardised, "none": centred}
"""By the value of `scale_rewards`, as TRL names them."""


def group_advantages(rewards: list[float | None], scale_rewards: str) -> list[float]:
    """Advantages of one group; a completion without a reward (None) takes no part and gets 0."""
    graded = [index for index, reward in enumerate(rewards) if reward is not None]
    advantages = [0.0] * len(rewards)
    if graded:
        values = torch.tensor([float(rewards[index] or 0.0) for index in graded], dtype=torch.float64)
        for index, advantage in zip(graded, SCALINGS[scale_rewards](values).tolist(), strict=True):
            advantages[index] = advantage
    return advantages
