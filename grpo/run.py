"""A recipe from start to end: base model, problems, grader, trainer, report; and a model looked at without training."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo.checkpoint import find_checkpoint
from grpo.config import Config, load_config
from grpo.data import Dataset, read_problems
from grpo.display import Display
from grpo.distributed import Ranks
from grpo.pretrain import base_model
from grpo.prompts import render_prompt
from grpo.record import RunFolder
from grpo.report import write_report
from grpo.trainer import Trainer, load_policy
from policy import CheckpointError
from policy.checkpoint import resolve_folder
from policy.tokenizer import load_tokenizer
from rewards import Grader, Problem
from rewards.registry import reward_name


def run(recipe: Path, overrides: Sequence[str], *, resume: bool) -> None:
    """Train by a recipe, and leave the run's folder with everything in it."""
    config = load_config(recipe, overrides)
    with _ranks(config) as ranks, Display(enabled=ranks.is_main) as display:
        folder = RunFolder(config.run_dir, display.note)
        if ranks.is_main:
            folder.open(config, resume=resume)
        ranks.wait()
        try:
            trainer = _prepare(config, ranks, folder, display)
            with _signals(trainer.request_stop):
                last = trainer.train()
            trainer.grader.close()
            if ranks.is_main:
                _finish(config, folder, display, last, [str(recipe), *overrides])
        finally:
            folder.close()
        ranks.wait()


def evaluate_model(recipe: Path, overrides: Sequence[str], model: Path | None) -> None:
    """Print one evaluation of a model as JSON."""
    config = load_config(recipe, overrides)
    with _ranks(config) as ranks, Display(enabled=ranks.is_main) as display:
        trainer = _prepare(config, ranks, RunFolder(config.run_dir, display.note), display, model or _trained(config))
        evaluation = trainer.evaluate_now(str(model or "last checkpoint"))
        trainer.grader.close()
    if ranks.is_main:
        print(json.dumps(evaluation, indent=2))


def sample_model(recipe: Path, overrides: Sequence[str], model: Path | None, prompt: str | None, num: int) -> None:
    """Print completions of one question."""
    config = load_config(recipe, overrides)
    with _ranks(config) as ranks, Display(enabled=ranks.is_main) as display:
        trainer = _prepare(config, ranks, RunFolder(config.run_dir, display.note), display, model or _trained(config))
        asked = None if prompt is None else Problem(id="asked", prompt=prompt, source="--prompt")
        texts = trainer.sample_now(asked or trainer.held_out[0], num, is_graded=asked is None)
        trainer.grader.close()
    if ranks.is_main:
        print("\n\n".join(texts))
