"""The reference of the KL penalty: a frozen copy of the policy, on its device or in host memory between uses."""

from __future__ import annotations

import copy

import torch

from grpo.scoring import score
from grpo.types import Batch
from policy import Policy
from policy.logprobs import TokenLogprobs
from rollouts import SamplingParams


class Reference:
    """A second copy of the weights, which may follow the policy slowly."""

    def __init__(self, policy: Policy, *, is_offloaded: bool = False) -> None:
        self._device = policy.device
        self._is_offloaded = is_offloaded
        self.policy: Policy = copy.deepcopy(policy).requires_grad_(False)
        self._put_away()

    @torch.no_grad()
    def score(self, batch: Batch, params: SamplingParams) -> TokenLogprobs:
        """The frozen policy's log-probabilities of a batch; its weights are on the device for as long as that takes."""
        self.policy.to(self._device)
        _, values = score(self.policy, batch, params)
        self._put_away()
        return values

    @torch.no_grad()
    def follow(self, policy: Policy, alpha: float) -> None:
        """ref = alpha * policy + (1 - alpha) * ref (TR-DPO, arXiv 2404.09656; TRL's `sync_ref_model`)."""
        for ours, theirs in zip(self.policy.parameters(), policy.parameters(), strict=True):
            ours.mul_(1.0 - alpha).add_(theirs.to(ours.device), alpha=alpha)

    def _put_away(self) -> None:
        if self._is_offloaded:
            self.policy.to("cpu")
