"""The reference of the KL penalty: a frozen copy of the policy, or the policy itself with its adapters off."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from grpo.scoring import score
from grpo.types import Batch
from grpo.weights import Weights
from policy import Policy
from policy.logprobs import TokenLogprobs
from policy.lora import adapters
from rollouts import SamplingParams


class Reference:
    """What the policy was at the start; a copy may follow the policy slowly.

    Where low-rank adapters are trained, no copy is needed: without them the policy is what it was.
    """

    def __init__(self, policy: Policy, *, is_offloaded: bool = False, weights: Weights | None = None) -> None:
        """`is_offloaded` keeps a copy's weights in host memory between uses; `weights` are the policy's, where these
        may lie in pieces.
        """
        self._device, self._is_offloaded = policy.device, is_offloaded
        self._adapters = list(adapters(policy).values())
        self._pieces = Policy.parameters if weights is None else weights.pieces
        if self._adapters:
            self.policy = policy
        elif weights is None:
            self.policy = copy.deepcopy(policy).requires_grad_(False)
        else:
            self.policy = weights.freeze_copy()
        self._put_away()

    @torch.no_grad()
    def score(self, batch: Batch, params: SamplingParams) -> TokenLogprobs:
        """The reference's log-probabilities of a batch; a copy is on the device for as long as that takes."""
        scales = [adapter.scale for adapter in self._adapters]
        if self._is_offloaded:
            self.policy.to(self._device)
        try:
            for adapter in self._adapters:
                adapter.scale = 0.0
            # Its own experts: what it makes of the tokens, not of the policy's ways.
            _, values = score(self.policy, replace(batch, experts_NMK=None), params)
        finally:
            for adapter, scale in zip(self._adapters, scales, strict=True):
                adapter.scale = scale
        self._put_away()
        return values

    @torch.no_grad()
    def follow(self, policy: Policy, alpha: float) -> None:
        """ref = alpha * policy + (1 - alpha) * ref (TR-DPO, arXiv 2404.09656; TRL's `sync_ref_model`)."""
        assert not self._adapters
        for ours, theirs in zip(self._pieces(self.policy), self._pieces(policy), strict=True):
            ours.mul_(1.0 - alpha).add_(theirs.to(ours.device), alpha=alpha)

    def _put_away(self) -> None:
        if self._is_offloaded and not self._adapters:
            self.policy.to("cpu")
