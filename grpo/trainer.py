"""The training loop: problems, groups, rewards, advantages, loss, update; each a function in a file of its own."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from types import FrameType

from grpo.advantages import group_advantages
from grpo.batch import count_learned_tokens, make_batches, make_rows
from grpo.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from grpo.collect import Collected, collect, sampling_params
from grpo.config import Config
from grpo.data import Dataset
from grpo.display import Display
from grpo.distributed import Ranks
from grpo.evaluate import Evaluator, make_evaluator
from grpo.metrics import graded, rollout_metrics, update_metrics
from grpo.optimizer import MasterAdamW, learning_rate_at
from grpo.prompts import render_prompts
from grpo.record import RunFolder
from grpo.types import Group
from grpo.update import UpdateStats, update
from policy import Policy
from policy.tokenizer import Tokenizer
from rewards import Grader, Problem
from rollouts import Engine, make_engine
from rollouts.sampler import mix


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
    """Optimizer steps done."""

    def train(self) -> int:
        """Evaluate, train, save, evaluate; gives the number of the last step done.

        Stops early, saved, once `stop_requested` is set.
        """
        with closing(make_engine(self.policy, self.config.engine)) as engine:
            return self._train(engine)

    def _train(self, engine: Engine) -> int:
        config = self.config
        optimizer = MasterAdamW(
            self.policy,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        reference = copy.deepcopy(self.policy).requires_grad_(False) if config.beta else None
        self._resume(optimizer)
        engine.load_weights(self.policy, self.step)
        evaluator = make_evaluator(
            config,
            self.policy,
            self.tokenizer,
            engine=engine,
            grader=self.grader,
            ranks=self.ranks,
            problems=self.held_out,
        )
        if self.step == 0:
            self._evaluate(evaluator, "base")
        self.display.stage("GRPO", config.max_steps, done=self.step)
        while self.step < config.max_steps and not self.ranks.any(self.stop_requested):
            started = perf_counter()
            first, problems = self.ranks.share(
                self.dataset.take(self.step * config.prompts_per_step, config.prompts_per_step)
            )
            collected = self._collect(problems, first, engine)
            advantages = [self._advantages(group) for group in collected.groups]
            stats, update_s = self._update(collected.groups, advantages, optimizer, reference)
            self.step += 1
            engine.load_weights(self.policy, self.step)
            self._record(collected, advantages, stats, update_s, started)
            if config.evaluation.eval_steps and self.step % config.evaluation.eval_steps == 0:
                self._evaluate(evaluator, self.step)
            if config.save_steps and self.step % config.save_steps == 0 and self.step < config.max_steps:
                self.save(optimizer)
        self.save(optimizer)
        if self.step >= config.max_steps:
            self._evaluate(evaluator, "final")
        return self.step

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """A signal handler: finish the step, save, leave. A second signal kills as usual."""
        self.stop_requested = True
        self.display.note(
            f"{signal.Signals(signum).name}: finishing step {self.step + 1}, then saving (again to quit at once)"
        )
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    def save(self, optimizer: MasterAdamW) -> None:
        """Write a checkpoint; a disk that refuses is said, and the last good one stays."""
        if self.ranks.is_main and not (self.folder.checkpoints / f"step_{self.step:06d}").is_dir():
            try:
                save_checkpoint(
                    self.folder.checkpoints,
                    self.step,
                    self.policy,
                    self.tokenizer,
                    optimizer,
                    self.config.save_total_limit,
                    lora=self.config.lora,
                    base_model=self.config.model,
                )
            except OSError as error:
                self.display.note(
                    f"checkpoint of step {self.step} not written ({error}); the run goes on, the last one stays"
                )
        self.ranks.wait()

    def _resume(self, optimizer: MasterAdamW) -> None:
        found = find_checkpoint(self.folder.checkpoints)
        self.ranks.wait()
        if found is not None:
            for line in found.damaged:
                self.display.note(line)
            load_checkpoint(found.path, self.policy, optimizer)
            self.step = found.step
        if self.ranks.is_main:
            self.folder.forget_after(self.step)

    def _collect(self, problems: Sequence[Problem], first: int, engine: Engine) -> Collected:
        config = self.config
        prompts = render_prompts(problems, config, self.tokenizer, self.policy.config.max_position_embeddings)
        base = self.step * config.prompts_per_step + first
        collected = collect(
            problems,
            prompts,
            engine=engine,
            tokenizer=self.tokenizer,
            grader=self.grader,
            num_generations=config.num_generations,
            params=sampling_params(config, self.tokenizer),
            prompt_seeds=[int(mix(config.seed, base + index)) for index in range(len(problems))],
        )
        return _shuffle_rewards(collected, config.seed, base) if config.shuffle_rewards else collected

    def _advantages(self, group: Group) -> list[float]:
        return group_advantages([result.reward for result in group.results], self.config.scale_rewards)

    def _update(
        self,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float]],
        optimizer: MasterAdamW,
        reference: Policy | None,
    ) -> tuple[UpdateStats, float]:
        config, started = self.config, perf_counter()
        rows = make_rows(groups, advantages, mask_truncated=config.mask_truncated_completions)
        stats = update(
            self.policy,
            optimizer,
            make_batches(rows, config.max_tokens_per_micro_batch, self.ranks.device),
            num_tokens=int(self.ranks.sum_number(count_learned_tokens(rows))),
            learning_rate=self._learning_rate(),
            config=config,
            ranks=self.ranks,
            reference=reference,
        )
        if stats.is_skipped:
            self.display.note(f"step {self.step + 1}: the gradient is not finite; the update was skipped")
        return stats, perf_counter() - started

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
        collected: Collected,
        advantages: Sequence[Sequence[float]],
        stats: UpdateStats,
        update_s: float,
        started: float,
    ) -> None:
        groups = self.ranks.gather(collected.groups)
        dealt = self.ranks.gather([list(of_group) for of_group in advantages])
        if self.ranks.is_main:
            self.folder.add_rollouts(self.step, groups, dealt)
        rollouts = rollout_metrics([graded(group) for group in groups])
        tokens = sum(len(group.prompt_ids) + len(c.token_ids) for group in groups for c in group.completions)
        elapsed = perf_counter() - started
        metrics = {
            "step": self.step,
            **rollouts,
            **update_metrics(stats),
            "learning_rate": self._learning_rate(),
            "step_time": elapsed,
            "time/sample": collected.sample_s,
            "time/grade": collected.grade_s,
            "time/update": update_s,
            "num_tokens": tokens,
            "tokens_per_second": tokens / elapsed,
        }
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


def _shuffle_rewards(collected: Collected, seed: int, step: int) -> Collected:
    """Deal the results out anew among all completions: the control in which reward says nothing about a completion."""
    results = [result for group in collected.groups for result in group.results]
    random.Random(f"shuffle {seed} {step}").shuffle(results)
    groups, start = [], 0
    for group in collected.groups:
        end = start + len(group.results)
        groups.append(
            Group(
                problem=group.problem,
                prompt_ids=group.prompt_ids,
                completions=group.completions,
                texts=group.texts,
                results=results[start:end],
            )
        )
        start = end
    return Collected(groups=groups, sample_s=collected.sample_s, grade_s=collected.grade_s)
