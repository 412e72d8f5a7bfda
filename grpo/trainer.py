"""The training loop: problems, groups, rewards, advantages, loss, update; each a function in a file of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from types import FrameType
from typing import Any

from grpo.advantages import step_advantages
from grpo.asking import Asked, Asking
from grpo.batch import make_minibatches, make_rows
from grpo.checkpoint import find_checkpoint, load_checkpoint, read_data_state, read_sampler, save_checkpoint
from grpo.collect import Collector, make_collector
from grpo.config import Config
from grpo.data import Dataset
from grpo.display import Display
from grpo.distributed import PreemptedError, Ranks
from grpo.entropy import EntropyState, adapted, applied_coefficient
from grpo.evaluate import Evaluator, make_evaluator
from grpo.metrics import engine_metrics, graded, policy_lag, rollout_metrics, update_metrics
from grpo.optimizer import learning_rate_at
from grpo.penalties import penalised_rewards
from grpo.pipeline import make_asking, moving
from grpo.record import RunFolder
from grpo.reference import Reference
from grpo.replay import NonFiniteError, save_fault
from grpo.shares import Spread, share_of
from grpo.silence import explain_silence
from grpo.throughput import ASKING, Phases, Spent, Throughput, measure_matmul_rate
from grpo.trial import Trial
from grpo.types import Group
from grpo.update import Step, UpdateStats, update
from grpo.version import describe_change
from grpo.watchdog import Watchdog
from grpo.weights import Weights, keep_weights
from policy import Policy
from policy.flops import Flops
from policy.tokenizer import Tokenizer
from rewards import Grader, Problem
from rollouts import EngineStats, make_engine


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
    weights: Weights = field(init=False)
    """The policy's, as the launcher's file has them kept over ranks."""
    trial: Trial | None = field(init=False)
    """What finds out which micro-batches fit, where weights lie in pieces."""
    phases: Phases = field(init=False)
    """Seconds and memory of the step in hand."""
    throughput: Throughput = field(init=False)
    """What makes rates of them."""
    peak_gib: float = 0.0
    """Most memory that torch allocated on a GPU in any step, GiB."""
    evaluation: dict[str, Any] | None = None
    """The last one of this process."""
    is_asking: bool = False
    """Whether nothing but the questions has moved since the last step, so that the step in hand can be given up."""

    def __post_init__(self) -> None:
        self.entropy = EntropyState(coefficient=self.config.entropy_coef)
        self.max_tokens = self.config.max_tokens_per_micro_batch
        self.phases = Phases(self.ranks.device)
        self.throughput = Throughput(
            flops=Flops.of(self.policy.config, self.config.lora),
            matmul_rate=measure_matmul_rate(self.ranks.device, self.policy.dtype),
        )
        self.weights = keep_weights(self.policy, self.config, self.ranks)
        self.trial = self._make_trial()

    def _make_trial(self) -> Trial | None:
        ranks = self.ranks
        if ranks.sharding is None:
            return None
        spread = Spread(way=ranks.sharding, num_processes=ranks.size, reshard_after_forward=ranks.reshard_after_forward)
        share = share_of(self.config, self.policy.config, spread, is_gpu=ranks.device.type == "cuda")
        return Trial(self.weights, set_aside=share.beside_trial)

    def train(self) -> int:
        """Evaluate, train, save, evaluate; gives the number of the last step done.

        Stops early, saved, once `stop_requested` is set.
        """
        # Before a rank that waits for this one gives up.
        most_s = self.config.ddp_timeout if self.ranks.size > 1 else None
        watchdog = Watchdog(self.folder.path, self.ranks.rank, self.display.note, most_s=most_s)
        engine = make_engine(self.weights.sampler, self.config.engine, self.tokenizer)
        with closing(watchdog), closing(engine):
            collector = make_collector(self.config, self.policy, self.tokenizer, self.grader, engine)
            with closing(make_asking(collector, self.ranks, self.dataset, self.weights)) as asker:
                return self._train(collector, asker, watchdog)

    def _train(self, collector: Collector, asker: Asking, watchdog: Watchdog) -> int:
        config = self.config
        reference = None
        if config.beta:
            reference = Reference(self.policy, is_offloaded=config.offload_ref_model, weights=self.weights)
        self._resume(asker, reference)
        self._publish(asker)
        evaluator = make_evaluator(collector, self.ranks, self.held_out)
        if self.step == 0:
            with self._can_be_given_up(asker, reference):
                self._evaluate(evaluator, asker, "base")
        self.display.stage("GRPO", config.max_steps, done=self.step)
        while self.step < config.max_steps and not self.ranks.any(self.stop_requested):
            watchdog.begin(self.step + 1)
            started, stats_before = perf_counter(), collector.engine.stats
            with self._can_be_given_up(asker, reference), self.phases.phase(ASKING):
                asked = asker.ask(self.step)
            sampled = collector.engine.stats - stats_before
            asker.ask_ahead(self.step)
            groups = [answer.group for answer in asked.filled.trained]
            mine = self.ranks.deal([group.num_tokens for group in groups])
            advantages = self._advantages(groups, mine, reference)
            stats, spent = self._update(groups, advantages, mine, reference)
            self.step += 1
            with self.phases.phase("sync"):
                self._publish(asker)
            self._record(asked, sampled, advantages, stats, spent, started)
            watchdog.end()
            if config.evaluation.eval_steps and self.step % config.evaluation.eval_steps == 0:
                with self._can_be_given_up(asker, reference):
                    self._evaluate(evaluator, asker, self.step)
                self.display.stage("GRPO", config.max_steps, done=self.step)
            if config.save_steps and self.step % config.save_steps == 0 and self.step < config.max_steps:
                self.save(asker, reference)
            if self.skipped >= config.max_skipped_steps:
                self.save(asker, reference)
                raise NonFiniteError(
                    f"{self.skipped} updates were not finite (max_skipped_steps: {config.max_skipped_steps}); see why "
                    f"with: grpo replay {self.folder.skipped}/FILE; a lower learning_rate or max_grad_norm may help"
                )
        self.save(asker, reference)
        if self.step >= config.max_steps:
            self._evaluate(evaluator, asker, "final")
        return self.step

    def _publish(self, asker: Asking) -> None:
        self.weights.publish()
        asker.follow(self.weights.sampler, self.step)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """A signal handler: finish the step, save, leave.

        After SIGTERM, which a kill follows, a step still sampling when `stop_timeout` is over is given up. A second
        SIGINT interrupts at once; the others may come twice, from a scheduler and from a launcher.
        """
        name = signal.Signals(signum).name
        if signum == signal.SIGALRM:
            if self.is_asking and self.ranks.may_give_up:
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
    def _can_be_given_up(self, asker: Asking, reference: Reference | None) -> Iterator[None]:
        """Around what changes nothing but the questions asked: given up, the state before it is saved."""
        before = asker.state()
        self.is_asking = True
        try:
            yield
        except PreemptedError as error:
            self.is_asking = False
            self.display.note(f"{error}; saving what was before it")
            self._write_checkpoint(asker, before, reference)
            raise
        finally:
            self.is_asking = False

    def save(self, asker: Asking, reference: Reference | None = None) -> None:
        """Write a checkpoint; a disk that refuses is said, and the last good one stays."""
        self._write_checkpoint(asker, asker.state(), reference)
        self.ranks.wait()

    def _write_checkpoint(self, asker: Asking, data: dict[str, Any], reference: Reference | None) -> None:
        weights, moves = self.weights, reference is not None and self.config.sync_ref_model
        is_written = (self.folder.checkpoints / f"step_{self.step:06d}").is_dir()
        if self.ranks.sharding is None and (is_written or not self.ranks.is_main):
            return
        # Where weights lie in pieces, all ranks hand theirs over.
        trained = weights.optimizer.state_tensors()
        referred = weights.whole(reference.policy) if reference is not None and moves else None
        if not self.ranks.is_main or is_written:
            return
        try:
            save_checkpoint(
                self.folder.checkpoints,
                self.step,
                weights.sampler,
                self.tokenizer,
                trained,
                self.config.save_total_limit,
                state={
                    "entropy_coef": self.entropy.coefficient,
                    "entropy": self.entropy.entropy,
                    "skipped": self.skipped,
                },
                reference=referred,
                sampler=None if asker.sampler is None else moving(asker.sampler, weights.optimizer.trained),
                lora=self.config.lora,
                base_model=self.config.model,
                data=data,
            )
        except OSError as error:
            self.display.note(
                f"checkpoint of step {self.step} not written ({error}); the run goes on, the last one stays"
            )

    def _resume(self, asker: Asking, reference: Reference | None) -> None:
        found = find_checkpoint(self.folder.checkpoints)
        self.ranks.wait()
        if found is not None:
            for line in (*found.damaged, describe_change(found.versions)):
                if line is not None:
                    self.display.note(line)
            load_checkpoint(found.path, self.weights, None if reference is None else reference.policy)
            asker.load_state(read_data_state(found.path))
            if asker.sampler is not None:
                asker.sampler.load_state_dict(read_sampler(found.path), strict=False)  # without what is frozen
            self.step, self.skipped = found.step, int(found.state.get("skipped") or 0)
            if (coefficient := found.state.get("entropy_coef")) is not None:
                self.entropy = EntropyState(coefficient=coefficient, entropy=found.state.get("entropy"))
        if self.ranks.is_main:
            self.folder.forget_after(self.step)

    def _advantages(
        self, groups: Sequence[Group], mine: Sequence[int], reference: Reference | None
    ) -> list[list[float]]:
        """Of the groups of all ranks; each looks at those at its own places for what is taken from their rewards."""
        own = penalised_rewards(
            [groups[place] for place in mine], self.config, policy=self.policy, reference=reference, ranks=self.ranks
        )
        rewards = dict(self.ranks.gather(list(zip(mine, own, strict=True))))
        parts = [[result.breakdown for result in group.results] for group in groups]
        return step_advantages(
            [rewards[place] for place in range(len(groups))], self.config, parts=parts, weights=self.grader.weights
        )

    def _update(
        self,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float]],
        mine: Sequence[int],
        reference: Reference | None,
    ) -> tuple[UpdateStats, Spent]:
        config, started = self.config, perf_counter()
        rows = make_rows(
            [groups[place] for place in mine],
            [advantages[place] for place in mine],
            mask_truncated=config.mask_truncated_completions,
            places=mine,
            version=self.step,
        )
        stats = update(
            self.policy,
            self.weights.optimizer,
            make_minibatches(
                rows, config.num_minibatches, self.max_tokens, self.ranks, share_prompts=config.share_prompts
            ),
            learning_rate=self._learning_rate(),
            config=config,
            ranks=self.ranks,
            reference=reference if config.kl_in == "loss" else None,
            entropy_coef=applied_coefficient(self.entropy, config),
            on_fault=self._keep_fault,
            phases=self.phases,
            trial=self.trial,
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
        lengths = [len(row) for row in rows if row.learned] * config.num_iterations
        num_tokens = self.ranks.sum_number(sum(lengths))
        return stats, Spent(seconds=perf_counter() - started, lengths=lengths, num_tokens=num_tokens)

    def _keep_fault(self, step: Step) -> None:
        """Say that an update was skipped, and keep what it would take to do it again."""
        name = f"step {self.step + 1}: loss or gradient is not finite; the update was skipped"
        self.weights.publish()
        file = self.folder.skipped / f"step_{self.step + 1:06d}_rank{self.ranks.rank}.safetensors"
        try:
            save_fault(file, policy=self.weights.sampler, step=step, config=self.config, number=self.step + 1)
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
        sampled: EngineStats,
        advantages: Sequence[Sequence[float]],
        stats: UpdateStats,
        spent: Spent,
        started: float,
    ) -> None:
        if self.ranks.is_main:
            self.folder.add_rollouts(self.step, asked.filled.trained, advantages, asked.filled.dropped)
        if self.step == 1 and (silence := explain_silence(asked.fresh, self.config, self.folder.path / "rollouts")):
            self.display.note(silence)
        rollouts = rollout_metrics([graded(group) for group in asked.fresh])
        tokens = sum(group.num_tokens for group in asked.fresh)
        elapsed = perf_counter() - started
        metrics = {
            "step": self.step,
            **rollouts,
            **engine_metrics([EngineStats(**own) for own in self.ranks.gather([asdict(sampled)])]),
            **asked.metrics,
            "sampling/policy_lag": policy_lag([answer.group for answer in asked.filled.trained], self.step - 1),
            **update_metrics(stats),
            "entropy_coef": applied_coefficient(self.entropy, self.config),
            "update/skipped_total": self.skipped,
            "learning_rate": self._learning_rate(),
            "step_time": elapsed,
            "time/sample": asked.sample_s,
            "time/grade": asked.grade_s,
            "time/grade_busy": asked.grade_busy_s,
            **self._spent_metrics(asked, spent),
            "num_tokens": tokens,
            "tokens_per_second": tokens / elapsed,
        }
        if self.ranks.is_main:
            self.folder.add_metrics(metrics)
        self.display.advance(metrics)

    def _spent_metrics(self, asked: Asked, spent: Spent) -> dict[str, float]:
        num_sampled = sum(len(c.token_ids) for group in asked.fresh for c in group.completions)
        metrics = self.throughput.metrics(spent, self.phases, num_sampled=num_sampled, sample_s=asked.sample_s)
        if self.ranks.device.type == "cuda":
            for key in ("memory/sample_peak_gib", "memory/update_peak_gib"):
                metrics[key] = self.ranks.max_number(metrics[key])
                self.peak_gib = max(self.peak_gib, metrics[key])
            metrics["memory/peak_gib"] = self.peak_gib
        return metrics

    def _evaluate(self, evaluator: Evaluator, asker: Asking, stage: str | int) -> None:
        if not evaluator.problems or any(e["stage"] == stage for e in self.folder.evaluations()):
            return
        if stage == "final" and self.evaluation is not None and self.evaluation["stage"] == self.step:
            evaluation = {**self.evaluation, "stage": stage}  # of the same weights, since `eval_steps` ends here too
        else:
            asker.settle(self.weights.sampler, self.step)
            self.display.stage(f"evaluation ({stage})", len(self.ranks.share(evaluator.problems)[1]))
            evaluation = evaluator.run(stage, lambda count: self.display.advance(steps=count))
            # A resumed run does not evaluate again, and must find the engine as this one does.
            evaluator.collector.engine.reset_prefix_cache()
        self.evaluation = evaluation
        if self.ranks.is_main:
            self.folder.add_evaluation(evaluation)
        self.display.note(
            f"{stage}: greedy {evaluation['greedy']:.1%}, avg@{evaluation['k']} {evaluation['avg@k']:.1%} "
            f"({evaluation['ci95'][0]:.1%} to {evaluation['ci95'][1]:.1%}), "
            f"pass@{evaluation['k']} {evaluation['pass@k']:.1%}, {evaluation['mean_length']:.0f} tokens"
        )
        self.ranks.wait()
