"""The training loop: problems, groups, rewards, advantages, loss, update; each a function in a file of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import FrameType
from typing import Any

import torch

from grpo.advantages import step_advantages
from grpo.asking import Asked, Asker, make_asker
from grpo.batch import make_minibatches, make_rows
from grpo.checkpoint import find_checkpoint, load_checkpoint, read_data_state, save_checkpoint
from grpo.collect import make_collector
from grpo.config import Config
from grpo.data import Dataset
from grpo.display import Display
from grpo.distributed import Ranks
from grpo.entropy import EntropyState, adapted, applied_coefficient
from grpo.evaluate import Evaluator, make_evaluator
from grpo.metrics import graded, rollout_metrics, update_metrics
from grpo.optimizer import MasterAdamW, learning_rate_at
from grpo.penalties import penalised_rewards
from grpo.record import RunFolder
from grpo.reference import Reference
from grpo.replay import NonFiniteError, save_fault
from grpo.types import Group
from grpo.update import Step, UpdateStats, update
from grpo.watchdog import Watchdog
from policy import Policy
from policy.tokenizer import Tokenizer
from rewards import Grader, Problem
from rollouts import Engine, make_engine


class PreemptedError(KeyboardInterrupt):
    """Asked to leave before the step in hand could be done; like an interrupt, it may come at any line."""


@dataclass(kw_only=True, slots=True)
class Trainer:
    """Runs one recipe on one policy, from wherever its folder left off."""

    config: Config
    policy: Policy
    tokenizer: Tokenizer
    dataset: Dataset
    held_out: Sequence[Problem]
    grader: Grader
    ranks: Ranks
    folder: RunFolder
    display: Display
    stop_requested: bool = False
    """Set by `request_stop`; the step in hand is finished and saved."""
    step: int = 0
    """Steps done."""
    entropy: EntropyState = field(init=False)
    """Where the adaptive entropy bonus stands."""
    skipped: int = 0
    """Optimizer steps not taken because they were not finite."""
    max_tokens: int = field(init=False)
    """Tokens of one micro-batch on this rank (`make_batches`); fewer than the recipe says once memory has run out."""
    is_asking: bool = False
    """Whether nothing but the questions has moved since the last step, so that the step in hand can be given up."""

    def __post_init__(self) -> None:
        self.entropy = EntropyState(coefficient=self.config.entropy_coef)
        self.max_tokens = self.config.max_tokens_per_micro_batch

    def train(self) -> int:
        """Evaluate, train, save, evaluate; gives the number of the last step done.

        Stops early, saved, once `stop_requested` is set.
        """
        watchdog = Watchdog(self.folder.path, self.ranks.rank, self.display.note)
        with closing(watchdog), closing(make_engine(self.policy, self.config.engine)) as engine:
            return self._train(engine, watchdog)

    def _train(self, engine: Engine, watchdog: Watchdog) -> int:
        config = self.config
        optimizer = MasterAdamW(
            self.policy,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        reference = Reference(self.policy, is_offloaded=config.offload_ref_model) if config.beta else None
        collector = make_collector(config, self.policy, self.tokenizer, self.grader, engine)
        asker = make_asker(collector, self.ranks, self.dataset)
        self._resume(optimizer, asker, reference)
        engine.load_weights(self.policy, self.step)
        evaluator = make_evaluator(collector, self.ranks, self.held_out)
        if self.step == 0:
            with self._can_be_given_up(optimizer, asker, reference):
                self._evaluate(evaluator, "base")
        self.display.stage("GRPO", config.max_steps, done=self.step)
        while self.step < config.max_steps and not self.ranks.any(self.stop_requested):
            watchdog.begin(self.step + 1)
            started = perf_counter()
            with self._can_be_given_up(optimizer, asker, reference):
                asked = asker.ask(self.step)
            first, groups = self.ranks.share([answer.group for answer in asked.filled.trained])
            advantages = self._advantages(groups, reference)
            stats, update_s = self._update(groups, advantages, first, optimizer, reference)
            self.step += 1
            engine.load_weights(self.policy, self.step)
            self._record(asked, advantages, stats, update_s, started)
            watchdog.end()
            if config.evaluation.eval_steps and self.step % config.evaluation.eval_steps == 0:
                with self._can_be_given_up(optimizer, asker, reference):
                    self._evaluate(evaluator, self.step)
            if config.save_steps and self.step % config.save_steps == 0 and self.step < config.max_steps:
                self.save(optimizer, asker, reference)
            if self.skipped >= config.max_skipped_steps:
                self.save(optimizer, asker, reference)
                raise NonFiniteError(
                    f"{self.skipped} updates were not finite (max_skipped_steps: {config.max_skipped_steps}); see why "
                    f"with: grpo replay {self.folder.skipped}/FILE; a lower learning_rate or max_grad_norm may help"
                )
        self.save(optimizer, asker, reference)
        if self.step >= config.max_steps:
            self._evaluate(evaluator, "final")
        return self.step

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """A signal handler: finish the step, save, leave.

        After SIGTERM, which a kill follows, a step still sampling when `stop_timeout` is over is given up. A second
        SIGINT interrupts at once; the others may come twice, from a scheduler and from a launcher.
        """
        name = signal.Signals(signum).name
        if signum == signal.SIGALRM:
            if self.is_asking:
                raise PreemptedError(f"step {self.step + 1} was given up, {self.config.stop_timeout:g} s after SIGTERM")
            return
        again = " (again to quit at once)" if signum == signal.SIGINT else ""
        if not self.stop_requested:
            self.display.note(f"{name}: finishing step {self.step + 1}, then saving{again}")
        self.stop_requested = True
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
        if signum == signal.SIGTERM and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            # Again every second: the step may be past its sampling now and at the next one's by then.
            signal.setitimer(signal.ITIMER_REAL, self.config.stop_timeout, 1.0)

    @contextmanager
    def _can_be_given_up(self, optimizer: MasterAdamW, asker: Asker, reference: Reference | None) -> Iterator[None]:
        """Around what changes nothing but the questions asked: given up, the state before it is saved."""
        before = asker.state()
        self.is_asking = True
        try:
            yield
        except PreemptedError as error:
            self.is_asking = False
            self.display.note(f"{error}; saving what was before it")
            self._write_checkpoint(optimizer, before, reference)
            raise
        finally:
            self.is_asking = False

    def save(self, optimizer: MasterAdamW, asker: Asker, reference: Reference | None = None) -> None:
        """Write a checkpoint; a disk that refuses is said, and the last good one stays."""
        self._write_checkpoint(optimizer, asker.state(), reference)
        self.ranks.wait()

    def _write_checkpoint(self, optimizer: MasterAdamW, data: dict[str, Any], reference: Reference | None) -> None:
        if self.ranks.is_main and not (self.folder.checkpoints / f"step_{self.step:06d}").is_dir():
            try:
                save_checkpoint(
                    self.folder.checkpoints,
                    self.step,
                    self.policy,
                    self.tokenizer,
                    optimizer,
                    self.config.save_total_limit,
                    state={
                        "entropy_coef": self.entropy.coefficient,
                        "entropy": self.entropy.entropy,
                        "skipped": self.skipped,
                    },
                    reference=reference.policy if reference is not None and self.config.sync_ref_model else None,
                    lora=self.config.lora,
                    base_model=self.config.model,
                    data=data,
                )
            except OSError as error:
                self.display.note(
                    f"checkpoint of step {self.step} not written ({error}); the run goes on, the last one stays"
                )

    def _resume(self, optimizer: MasterAdamW, asker: Asker, reference: Reference | None) -> None:
        found = find_checkpoint(self.folder.checkpoints)
        self.ranks.wait()
        if found is not None:
            for line in found.damaged:
                self.display.note(line)
            load_checkpoint(found.path, self.policy, optimizer, None if reference is None else reference.policy)
            asker.load_state(read_data_state(found.path))
            self.step, self.skipped = found.step, int(found.state.get("skipped") or 0)
            if (coefficient := found.state.get("entropy_coef")) is not None:
                self.entropy = EntropyState(coefficient=coefficient, entropy=found.state.get("entropy"))
        if self.ranks.is_main:
            self.folder.forget_after(self.step)

    def _advantages(self, groups: Sequence[Group], reference: Reference | None) -> list[list[float]]:
        """Of this rank's groups, from the rewards of all ranks."""
        config, ranks = self.config, self.ranks
        rewards = ranks.gather(penalised_rewards(groups, config, policy=self.policy, reference=reference))
        parts = ranks.gather([[result.breakdown for result in group.results] for group in groups])
        before = sum(ranks.gather([len(groups)])[: ranks.rank])
        advantages = step_advantages(rewards, config, parts=parts, weights=self.grader.weights)
        return advantages[before : before + len(groups)]

    def _update(
        self,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float]],
        first: int,
        optimizer: MasterAdamW,
        reference: Reference | None,
    ) -> tuple[UpdateStats, float]:
        config, started = self.config, perf_counter()
        rows = make_rows(
            groups,
            advantages,
            mask_truncated=config.mask_truncated_completions,
            first_problem=first,
            version=self.step,
        )
        stats = update(
            self.policy,
            optimizer,
            make_minibatches(
                rows, config.num_minibatches, self.max_tokens, self.ranks, share_prompts=config.share_prompts
            ),
            learning_rate=self._learning_rate(),
            config=config,
            ranks=self.ranks,
            reference=reference if config.kl_in == "loss" else None,
            entropy_coef=applied_coefficient(self.entropy, config),
            on_fault=self._keep_fault,
        )
        if stats.num_halvings:
            self.max_tokens = max(1, self.max_tokens >> stats.num_halvings)
            self.display.note(
                f"step {self.step + 1}: out of memory; done again in smaller micro-batches, of at most "
                f"{self.max_tokens} tokens from now on (max_tokens_per_micro_batch)"
            )
        self.skipped += stats.num_skipped
        self.entropy = adapted(self.entropy, stats.entropy_kept, config)
        if reference is not None and config.sync_ref_model and (self.step + 1) % config.ref_model_sync_steps == 0:
            reference.follow(self.policy, config.ref_model_mixup_alpha)
        return stats, perf_counter() - started

    def _keep_fault(self, step: Step) -> None:
        """Say that an update was skipped, and keep what it would take to do it again."""
        name = f"step {self.step + 1}: loss or gradient is not finite; the update was skipped"
        file = self.folder.skipped / f"step_{self.step + 1:06d}_rank{self.ranks.rank}.safetensors"
        try:
            save_fault(file, policy=self.policy, step=step, config=self.config, number=self.step + 1)
            self.display.note(f"{name}; grpo replay {file} says why")
        except OSError as error:
            self.display.note(f"{name}; {file} was not written ({error})")

    def _learning_rate(self) -> float:
        config = self.config
        return learning_rate_at(
            self.step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            max_steps=config.max_steps,
            kind=config.lr_scheduler_type,
        )

    def _record(
        self,
        asked: Asked,
        advantages: Sequence[Sequence[float]],
        stats: UpdateStats,
        update_s: float,
        started: float,
    ) -> None:
        dealt = self.ranks.gather([list(of_group) for of_group in advantages])
        if self.ranks.is_main:
            self.folder.add_rollouts(self.step, asked.filled.trained, dealt, asked.filled.dropped)
        rollouts = rollout_metrics([graded(group) for group in asked.fresh])
        tokens = sum(len(group.prompt_ids) + len(c.token_ids) for group in asked.fresh for c in group.completions)
        elapsed = perf_counter() - started
        metrics = {
            "step": self.step,
            **rollouts,
            **asked.metrics,
            **update_metrics(stats),
            "entropy_coef": applied_coefficient(self.entropy, self.config),
            "update/skipped_total": self.skipped,
            "learning_rate": self._learning_rate(),
            "step_time": elapsed,
            "time/sample": asked.sample_s,
            "time/grade": asked.grade_s,
            "time/update": update_s,
            "num_tokens": tokens,
            "tokens_per_second": tokens / elapsed,
        }
        if self.policy.device.type == "cuda":
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.policy.device) / 2**30
        if self.ranks.is_main:
            self.folder.add_metrics(metrics)
        self.display.advance(metrics)

    def _evaluate(self, evaluator: Evaluator, stage: str | int) -> None:
        if not evaluator.problems or any(e["stage"] == stage for e in self.folder.evaluations()):
            return
        self.display.stage(f"evaluation ({stage})", len(self.ranks.share(evaluator.problems)[1]))
        evaluation = evaluator.run(stage, lambda count: self.display.advance(steps=count))
        if self.ranks.is_main:
            self.folder.add_evaluation(evaluation)
        self.display.note(
            f"{stage}: greedy {evaluation['greedy']:.1%}, avg@{evaluation['k']} {evaluation['avg@k']:.1%} "
            f"({evaluation['ci95'][0]:.1%} to {evaluation['ci95'][1]:.1%}), {evaluation['mean_length']:.0f} tokens"
        )
        self.ranks.wait()
