"""`rollout_lag: 1`, one step off: the next step is sampled, by servers, while the policy trains on this one.

    step      0    1    2    3    ...     what the policy trains on
    sampled   v0   v0   v1   v2   ...     version of the weights that sampled it; step k trains version k

What samples is a copy of the weights, as they were when the step in hand began. So a server that comes back in the
middle of an update gets what the others have, every completion is of one version, and a checkpoint with the copy in it
can ask again what was in flight. The loss takes the recorded log-probabilities for the old policy's (`stale_N`), so its
ratio is the policy's to that version. Staleness of one step and its price: "Asynchronous RLHF", arXiv 2410.18252.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from grpo.asking import Asked, Asker, Asking, make_asker
from grpo.collect import Collector
from grpo.data import Dataset
from grpo.distributed import Ranks
from grpo.weights import Weights, copy_policy, sampler_device
from policy import Policy
from rewards.background import run_apart
from rollouts import Engine

CLOSE_S = 30.0
"""Longest wait for other ranks to end."""


class AskerAhead:
    """An `Asking` whose questions of a step are out while the step before it trains; one step is out at most."""

    def __init__(
        self, asker: Asker, engine: Engine, weights: Weights, ranks: Ranks, max_steps: int, device: torch.device
    ) -> None:
        """`asker` asks, in a thread of its own, what `engine` samples with a copy of the newest weights, on `device`.

        On the policy's own device, weights that do not move are not copied.
        """
        self._asker, self._engine, self._ranks, self._max_steps = asker, engine, ranks, max_steps
        self._policy, self._trained = weights.sampler, weights.optimizer.trained
        frozen = [weight for name, weight in self._policy.named_parameters() if name not in self._trained]
        self._sampler = copy_policy(
            self._policy, device, shared=frozen if device.type == self._policy.device.type else ()
        )
        self._version = 0
        """Of the copy."""
        self._sent: int | None = None
        """Version of the copy that the engine holds; None: the engine holds something else."""
        self._before = copy.deepcopy(asker.state())
        self._out: Future[Asked] | None = None

    @property
    def sampler(self) -> Policy:
        """What samples, or sampled last."""
        return self._sampler

    def ask(self, step: int) -> Asked:
        """Wait for the groups of this step; they are asked now only where a run begins or goes on."""
        started = perf_counter()
        if self._out is None:
            self._begin(step)
        assert self._out is not None
        with self._ranks.alone():
            asked = self._out.result()
        return replace(
            asked,
            sample_s=perf_counter() - started,
            grade_s=0.0,
            metrics={**asked.metrics, "time/sample_busy": asked.sample_s + asked.grade_s},
        )

    def ask_ahead(self, step: int) -> None:
        """The groups of `step` are here: have those of the next sampled with the weights as they are now."""
        assert self._out is not None
        assert self._out.done()
        self._out = None
        with torch.no_grad():
            for ours, theirs in zip(
                moving(self._sampler, self._trained).values(), moving(self._policy, self._trained).values(), strict=True
            ):
                ours.copy_(theirs)
        self._version, self._before = step, copy.deepcopy(self._asker.state())
        if step + 1 < self._max_steps:
            self._begin(step + 1)

    def follow(self, policy: Policy, version: int) -> None:
        """Nothing: what is out is of the version before; `ask_ahead` sends this one."""

    def settle(self, policy: Policy, version: int) -> None:
        """Wait for what is out, and have the engine hold this version, to be evaluated."""
        if self._out is not None:
            with self._ranks.alone():
                self._out.result()
        self._sent = None
        self._engine.load_weights(policy, version)

    def state(self) -> dict[str, Any]:
        """Before the questions that are out: a resumed run asks them again, of the copy, with the same seeds."""
        return {**self._before, "sampler_version": self._version}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; the copy's weights are for the caller to restore."""
        self._asker.load_state(state)
        self._version, self._before = int(state["sampler_version"]), copy.deepcopy(self._asker.state())

    def close(self) -> None:
        """Drop the questions that are out, and have the thread end that asked them.

        Where the process left without it, in the middle of an exchange with other ranks' threads, it would crash. These
        end in turn: one that waits for another's answers hears that it is gone.
        """
        self._engine.close()
        self._asker.collector.grader.cancel()
        if self._out is not None:
            wait([self._out], timeout=CLOSE_S)

    def _begin(self, step: int) -> None:
        if self._sent != self._version:
            self._engine.load_weights(self._sampler, self._version)
            self._sent = self._version
        self._out = run_apart(lambda: self._asker.ask(step), f"asking step {step + 1}")


def moving(policy: Policy, trained: Collection[str]) -> dict[str, Tensor]:
    """All of a policy that training changes: the weights named, and the routers' biases."""
    weights = {name: weight.detach() for name, weight in policy.named_parameters() if name in trained}
    return weights | dict(policy.named_buffers())


def make_asking(collector: Collector, ranks: Ranks, dataset: Dataset, weights: Weights) -> Asking:
    """What asks the problems of the collector's recipe: in step with the policy, or one step ahead of it."""
    if not collector.config.rollout_lag:
        return make_asker(collector, ranks, dataset)
    asker = make_asker(collector, ranks.apart(), dataset)
    device = sampler_device(collector.config, ranks.device)
    return AskerAhead(asker, collector.engine, weights, ranks, collector.config.max_steps, device)
