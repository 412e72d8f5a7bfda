"""A recipe from start to end: base model, problems, grader, trainer, report; and a model looked at without training."""

from __future__ import annotations

import gc
import json
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import policy as policies
from grpo.auxiliary import check_auxiliary
from grpo.checkpoint import find_checkpoint
from grpo.collect import make_collector, sampling_params
from grpo.config import Config, ConfigError, load_config
from grpo.data import Dataset, read_problems
from grpo.display import Display
from grpo.distributed import PreemptedError, Ranks
from grpo.evaluate import make_evaluator
from grpo.pretrain import base_model
from grpo.record import RunFolder
from grpo.report import write_report
from grpo.routing_replay import freeze_routers
from grpo.trainer import Trainer
from policy import CheckpointError, Policy
from policy.checkpoint import resolve_folder
from policy.lora import LoraError, add_adapters
from policy.tokenizer import Tokenizer, load_tokenizer
from rewards import Grader, Problem
from rollouts import make_engine
from rollouts.stop_strings import stop_strings_of

PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends to a job that has to leave: before a kill, and ahead of the end of its time (Slurm)."""


def run(recipe: Path, overrides: Sequence[str], *, resume: bool) -> None:
    """Train by a recipe, and leave the run's folder with everything in it."""
    config = load_config(recipe, overrides)
    with _signals(_leave, PREEMPTIONS), _setting(config) as setting:
        folder = RunFolder(config.run_dir, setting.display.note)
        if setting.ranks.is_main:
            folder.open(config, resume=resume)
        setting.ranks.wait()
        try:
            last = _train(config, setting, folder)
        finally:
            folder.close()
        if setting.ranks.is_main:
            _close(config, setting.display, folder, last, [str(recipe), *overrides])


def evaluate_model(recipe: Path, overrides: Sequence[str], model: Path | None) -> None:
    """Print one evaluation of a model as JSON."""
    config = load_config(recipe, overrides)
    problems = _held_out(config)
    if not problems:
        raise ConfigError("evaluation.num_problems is 0: there is nothing to evaluate")
    with _setting(config) as setting, _grader(config) as grader:
        policy, tokenizer = _load(config, _resolve(model) if model else _last_checkpoint(config), setting.ranks.device)
        with closing(make_engine(policy, config.engine, tokenizer)) as engine:
            collector = make_collector(config, policy, tokenizer, grader, engine)
            evaluation = make_evaluator(collector, setting.ranks, problems).run(str(model or "last checkpoint"))
    if setting.ranks.is_main:
        print(json.dumps(evaluation, indent=2))


def sample_model(recipe: Path, overrides: Sequence[str], model: Path | None, prompt: str | None, num: int) -> None:
    """Print completions of one question; of a held-out problem with their rewards."""
    config = load_config(recipe, overrides)
    asked = None if prompt is None else Problem(id="asked", prompt=prompt, source="--prompt")
    problems = _held_out(config) if asked is None else [asked]
    if not problems:
        raise ConfigError("evaluation.num_problems is 0, so no problem is held out; give --prompt TEXT")
    with _setting(config) as setting, _grader(config) as grader, ExitStack() as stack:
        policy, tokenizer = _load(config, _resolve(model) if model else _last_checkpoint(config), setting.ranks.device)
        engine = stack.enter_context(closing(make_engine(policy, config.engine, tokenizer)))
        collector = make_collector(config, policy, tokenizer, grader, engine)
        prompts, params = collector.render(problems[:1]), sampling_params(config, tokenizer)
        print(tokenizer.decode(prompts[0]))
        if asked is not None:
            for completion in collector.engine.generate(prompts, num, params)[0]:
                print(f"\n{tokenizer.decode(completion.token_ids)}")
            return
        [group] = collector.collect(
            problems[:1], prompts, num_generations=num, params=params, prompt_seeds=[config.seed]
        ).groups
        for text, result in zip(group.texts, group.results, strict=True):
            print(f"\n[{result.reward}] {text}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    ranks: Ranks
    display: Display


@contextmanager
def _setting(config: Config) -> Iterator[_Setting]:
    # Before the first parallel product: the thread pool takes the flag over from this thread. Attention weights that
    # underflow to denormal numbers otherwise slow a CPU down once a policy is sure of itself.
    torch.set_flush_denormal(True)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    is_cpu = config.device == "cpu" or not torch.cuda.is_available()
    ranks = Ranks(cpu=is_cpu, timeout_s=config.ddp_timeout)
    try:
        with Display(rank=ranks.rank) as display:
            if ranks.shares_gpu:
                display.note("more processes than GPUs: they share one, and messages go through the host (slow)")
            yield _Setting(ranks=ranks, display=display)
    finally:
        torch.set_flush_denormal(False)
    ranks.close()


def _train(config: Config, setting: _Setting, folder: RunFolder) -> int:
    """Number of the last step done."""
    ranks, display = setting.ranks, setting.display
    with _grader(config) as grader:
        problems = read_problems(config.dataset, seed=config.seed, split="train", count=config.dataset.num_problems)
        held_out = _held_out(config)
        # What comes in pieces may be larger than a device.
        policy, tokenizer = _load(config, _start(config, setting), "cpu" if ranks.sharding else ranks.device)
        check_auxiliary(config, policy.config)
        stop_strings_of(sampling_params(config, tokenizer), tokenizer)
        policy.recomputation = config.activation_recomputation
        if config.freeze_router:
            freeze_routers(policy)
        if config.lora is not None:
            try:
                add_adapters(policy, config.lora, config.seed)
            except LoraError as error:
                raise ConfigError(str(error)) from None
        trainer = Trainer(
            config=config,
            policy=policy,
            tokenizer=tokenizer,
            dataset=Dataset(problems, config.seed),
            held_out=held_out,
            grader=grader,
            ranks=ranks,
            folder=folder,
            display=display,
        )
        with _signals(trainer.request_stop, (signal.SIGINT, signal.SIGALRM, *PREEMPTIONS)), _nothing_to_collect():
            return trainer.train()


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Within, Python's garbage collector leaves alone what is there already, which stays to the end: the libraries'
    hundreds of thousands of objects, looked through once a step or so, take a good part of a second each time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _start(config: Config, setting: _Setting) -> Path:
    """Folder of the model that training starts from, itself trained first where the recipe says so."""
    if config.model is not None:
        return _resolve(config.model)
    assert config.base is not None
    setting.display.stage("base model", config.base.max_steps)
    folder = base_model(config, setting.ranks, setting.display.advance)
    setting.display.note(f"base model: {folder}")
    return folder


def _resolve(model: Path | str) -> Path:
    try:
        return resolve_folder(model)
    except ValueError as error:  # the hub's word for a name that cannot be an id
        raise CheckpointError(f"no folder {str(model)!r} here, and no id of the hub either: {error}") from None


def _load(config: Config, folder: Path, device: torch.device | str) -> tuple[Policy, Tokenizer]:
    policy = policies.load(folder, dtype=getattr(torch, config.dtype), device=str(device))
    policy.residual_in_fp32 = config.residual_in_fp32
    return policy, load_tokenizer(folder)


def _held_out(config: Config) -> list[Problem]:
    wanted = config.evaluation
    if wanted.num_problems == 0:
        return []
    if wanted.path is None:
        return read_problems(config.dataset, seed=config.seed, split="held_out", count=wanted.num_problems)
    source = config.dataset.model_copy(update={"path": wanted.path, "countdown": None})
    return read_problems(source, seed=config.seed, split="all", count=wanted.num_problems)


def _grader(config: Config) -> Grader:
    return Grader(
        config.rewards,
        weights=config.reward_weights,
        num_workers=config.reward_workers,
        timeout_s=config.reward_timeout,
        memory_mb=config.reward_memory_mb,
        pass_env=config.reward_env,
    )


def _last_checkpoint(config: Config) -> Path:
    found = find_checkpoint(config.run_dir / "checkpoints")
    if found is None:
        raise CheckpointError(f"{config.run_dir} holds no checkpoint; train first, or give --model FOLDER")
    return found.path


def _close(config: Config, display: Display, folder: RunFolder, last: int, arguments: Sequence[str]) -> None:
    """Report, before and after, and how to go on where the run is not done."""
    try:
        display.note(f"report: {write_report(folder.path)}")
    except OSError as error:
        display.note(f"report.html not written ({error}); `grpo report {folder.path}` writes it anew")
    by_stage = {evaluation["stage"]: evaluation for evaluation in folder.evaluations()}
    if last < config.max_steps:
        display.note(f"stopped after step {last}; continue with: grpo train {shlex.join(arguments)} --resume")
    elif {"base", "final"} <= by_stage.keys():
        base, final = by_stage["base"], by_stage["final"]
        gain = 100 * (final["avg@k"] - base["avg@k"])
        display.note(f"{'':8}{'base':>8}{'final':>8}")
        display.note(f"{'greedy':8}{base['greedy']:8.1%}{final['greedy']:8.1%}")
        display.note(f"{'avg@' + str(base['k']):8}{base['avg@k']:8.1%}{final['avg@k']:8.1%}   ({gain:+.1f} points)")
        if "pass@k" in base:  # not in what an earlier version began
            display.note(f"{'pass@' + str(base['k']):8}{base['pass@k']:8.1%}{final['pass@k']:8.1%}")
        display.note(f"{'tokens':8}{base['mean_length']:8.0f}{final['mean_length']:8.0f}")


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], Any], numbers: Iterable[signal.Signals]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, previous in before.items():
            signal.signal(number, previous)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Before the first step, and after the last, there is nothing to finish."""
    raise PreemptedError(f"{signal.Signals(signum).name}: leaving")
