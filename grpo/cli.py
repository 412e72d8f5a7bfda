"""The command `grpo`: train, plan, eval, sample, report, replay, code-data, sandbox, reward check.

Errors that a person can mend are one line and exit code 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Teach a language model to reason with reinforcement learning, R1-Zero style.",
)

reward_app = typer.Typer(no_args_is_help=True, help="Look into rewards.")
app.add_typer(reward_app, name="reward")

Recipe = Annotated[Path, typer.Argument(help="recipe, a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings that replace the recipe's: a.b=value")]


def main() -> None:
    """Entry point of the command; nothing before it may import torch."""
    # GNU OpenMP reads this once, when torch loads it. By default a thread that waits for another spins for long;
    # where another program shares the cores, that starves the very thread it waits for (seen: 50 times slower).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app()


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in its folder, if there is one")] = False,
) -> None:
    """Train by a recipe: base model where needed, evaluation, GRPO, evaluation, report."""
    from grpo.run import run

    with _errors_in_one_line():
        run(recipe, overrides or [], resume=resume)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="memory of the device, GiB; default: what is found here")
    ] = None,
    device_name: Annotated[str | None, typer.Option(help="what to call the device")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="tokens of a prompt; default: 256")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="processes that share a step; default: 1")] = None,
    weights: Annotated[
        str | None, typer.Option(help="how they keep the policy: whole, fsdp2, zero2 or zero3; default: whole")
    ] = None,
    accelerate: Annotated[Path | None, typer.Option(help="the launcher's file, which says both")] = None,
) -> None:
    """Say what a recipe will need of each device's memory, and what to change if it does not fit (exit code 1)."""
    from grpo.plan_text import plan_recipe

    with _errors_in_one_line():
        told = plan_recipe(
            recipe,
            overrides or [],
            memory_gib=memory_gib,
            device_name=device_name,
            prompt_tokens=prompt_tokens,
            num_processes=processes,
            weights=weights,
            launcher_file=accelerate,
        )
    typer.echo(told.text)
    if not told.fits:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="folder or hub id of the model; default: the run's last checkpoint")
    ] = None,
) -> None:
    """Evaluate a model on a recipe's held-out problems and print the result as JSON."""
    from grpo.run import evaluate_model

    with _errors_in_one_line():
        evaluate_model(recipe, overrides or [], model)


@app.command()
def sample(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="folder or hub id of the model; default: the run's last checkpoint")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="question to ask; default: a held-out problem")] = None,
    num: Annotated[int, typer.Option(min=1, help="completions")] = 4,
) -> None:
    """Print completions of one question, with their rewards where the problem is known."""
    from grpo.run import sample_model

    with _errors_in_one_line():
        sample_model(recipe, overrides or [], model, prompt, num)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write report.html of a run anew."""
    from grpo.report import write_report
    from policy import CheckpointError

    with _errors_in_one_line():
        if not (run_dir / "config.yaml").is_file():
            raise CheckpointError(f"{run_dir} holds no run (it has no config.yaml)")
        typer.echo(f"wrote {write_report(run_dir)}")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="a skipped update: runs/NAME/skipped/*.safetensors")],
) -> None:
    """Do a skipped update again and say which row and token is at fault."""
    from grpo.replay import replay as replay_update

    with _errors_in_one_line():
        found = replay_update(file)
    typer.echo(f"step {found.number}: loss {found.loss:g}, gradient norm {found.grad_norm:g}, {found.num_rows} rows")
    for fault in found.faults:
        row = f"problem {fault.origin.problem}, completion {fault.origin.completion}"
        typer.echo(f"{row}, from token {fault.token} (id {fault.token_id}) on: {fault.what} is not finite")
    if not found.faults:
        typer.echo("every row of this file is finite by itself: the fault is in their sum, or on another rank")


@app.command("code-data")
def write_code_data(
    source: Annotated[str, typer.Argument(help="a .jsonl, .json or .parquet file, or a hub id")],
    out: Annotated[Path, typer.Argument(help="the .jsonl file to write, for dataset.path")],
    layout: Annotated[str, typer.Option(help="humaneval, mbpp, apps, livecodebench, open_r1 or prime")],
    split: Annotated[str, typer.Option(help="split of a hub dataset; several: train+validation")] = "train",
    config_name: Annotated[str | None, typer.Option(help="configuration of a hub dataset")] = None,
) -> None:
    """Write a code dataset's questions and tests as a file that a recipe with the reward `code` reads."""
    from grpo.code_data import convert
    from grpo.config import DatasetConfig

    with _errors_in_one_line():
        done = convert(DatasetConfig(path=source, split=split, config_name=config_name), layout, out)
    typer.echo(f"wrote {done.num_written} problems to {out}")
    if done.refused:
        typer.echo(f"left out {len(done.refused)} rows; the first: {done.refused[0]}")


@app.command()
def sandbox() -> None:
    """Say what this machine offers to keep programs in, and try the walls."""
    from rewards.sandbox.report import describe_machine, report_levels, run_self_test
    from rewards.sandbox.sandbox import Sandbox

    typer.echo(describe_machine())
    for level in report_levels():
        typer.echo(f"level {level.level}: {'available' if level.is_available else 'not available'}: {level.reason}")
    with _errors_in_one_line(), Sandbox() as jail:
        checks = run_self_test(jail)
    for check in checks:
        typer.echo(f"{'ok  ' if check.has_passed else 'FAIL'} {check.name}: {check.detail}")
    if not all(check.has_passed for check in checks):
        raise typer.Exit(1)


@reward_app.command("check")
def check_reward(
    reward: Annotated[str, typer.Argument(help="registry name or module:function")] = "math",
    completion: Annotated[str | None, typer.Option(help="a completion to grade")] = None,
    gold: Annotated[str | None, typer.Option(help="the answer that is right")] = None,
    file: Annotated[Path | None, typer.Option(help="a JSONL file of completions and golds to grade")] = None,
) -> None:
    """Explain one verdict of the math reward stage by stage, or grade a file with any reward and count."""
    from grpo.data import DatasetError
    from rewards.check import check_file, explain_verdict

    if file is not None:
        with _errors_in_one_line():
            try:
                checked = check_file(file, reward=reward)
            except (OSError, ValueError) as error:
                raise DatasetError(f"{file}: {error}") from None
        for row in checked.rows:
            typer.echo(f"{row.line}\t{row.result.reward}\t{row.result.status}\t{row.result.detail}")
        counts = ", ".join(f"{status} {count}" for status, count in sorted(checked.statuses.items()))
        typer.echo(f"{len(checked.rows)} rows, mean reward {checked.mean_reward:.4f}; {counts}")
        if checked.disagreements:
            typer.echo(f"{len(checked.disagreements)} differ from the column 'expected'")
    elif reward not in ("math", "accuracy"):
        typer.echo(f"error: only the math reward explains itself; grade with {reward!r} through --file", err=True)
        raise typer.Exit(2)
    elif completion is not None and gold is not None:
        for stage, what in explain_verdict(completion, gold):
            typer.echo(f"{stage:8} {what}")
    else:
        typer.echo("error: give --completion and --gold, or --file", err=True)
        raise typer.Exit(2)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    from grpo.config import ConfigError
    from grpo.countdown import CountdownError
    from grpo.data import DatasetError
    from grpo.distributed import PreemptedError, RankLostError
    from grpo.memory import DeviceMemoryError
    from grpo.prompts import PromptError
    from grpo.record import RunFolderError
    from grpo.replay import NonFiniteError, ReplayError
    from policy import CheckpointError, ShapeError
    from policy.tokenizer import TokenizerError
    from rewards.grader_pool import GraderError
    from rewards.registry import RewardNotFoundError, RewardSignatureError
    from rewards.sandbox.sandbox import SandboxUnavailableError
    from rollouts import SamplingError

    try:
        yield
    except (
        CheckpointError,
        ConfigError,
        CountdownError,
        DatasetError,
        DeviceMemoryError,
        GraderError,
        NonFiniteError,
        PromptError,
        RankLostError,
        ReplayError,
        RewardNotFoundError,
        RewardSignatureError,
        RunFolderError,
        SamplingError,
        SandboxUnavailableError,
        ShapeError,
        TokenizerError,
    ) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    except PreemptedError as error:  # a scheduler's wish is no failure
        typer.echo(f"{error}; what was saved stays, and the same command with --resume goes on", err=True)
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; what was saved before stays, and the same command with --resume goes on", err=True)
        raise typer.Exit(130) from None
