"""A base model from nothing: next-token prediction (and multi-token prediction) on generated text of unguided attempts.

The result depends only on its recipe, by whose hash it is cached: the same recipe gives the same base model.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import policy as policies
from grpo.batch import cut_by_tokens
from grpo.checkpoint import written_whole
from grpo.config import DEFAULT_CONTEXT, BaseConfig, Config, ConfigError
from grpo.countdown import CountdownConfig, generate_problems, problem_text, vocabulary, write_attempts
from grpo.data import to_problem
from grpo.distributed import Ranks
from grpo.metrics import router_metrics
from grpo.optimizer import MasterAdamW, learning_rate_at
from grpo.prompts import render_prompts
from grpo.routers import RouterTotals, balance
from policy import CheckpointError, PackedRows, Policy, PolicyConfig, cast_weights, initialise
from policy.balance import RouterWatch, router_loss
from policy.logprobs import next_token_loss
from policy.tokenizer import Tokenizer, build_word_tokenizer

FORMAT = 1
"""Part of the cache's key: raise it when the same recipe would give another model."""
POOL = 1500
"""Texts that are sorted by length together."""

Progress = Callable[[dict[str, Any]], None]


def base_model(config: Config, ranks: Ranks, progress: Progress) -> Path:
    """Folder of the recipe's base model, trained first where the cache lacks it.

    Raises before the training what would make its result useless: PromptError where a problem leaves no room for a
    completion, CheckpointError where the cache cannot be written (after it too, should the disk have filled up).
    """
    base, task = config.base, config.dataset.countdown
    assert base is not None
    assert task is not None
    recipe = {
        "format": FORMAT,
        "base": base.model_dump(mode="json", exclude={"cache_dir"}),
        "task": task.model_dump(mode="json"),
        "template": config.prompt_template,
        "seed": config.seed,
        "dtype": config.dtype,
        "torch": torch.__version__.split("+")[0],
        "ranks": ranks.size,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = base.cache_dir / f"base-{digest}"
    is_cached = (folder / "recipe.json").is_file()
    ranks.wait()
    if is_cached:
        return folder
    policy, tokenizer = build_policy(config, base, task)
    problem = to_problem(next(generate_problems(task, config.seed, "train")), config.dataset, "dataset.countdown")
    render_prompts([problem], config, tokenizer, policy.config.max_position_embeddings)
    if ranks.is_main:
        _write(base.cache_dir, lambda: base.cache_dir.mkdir(parents=True, exist_ok=True))
    policy.to(ranks.device)
    train_base(policy, tokenizer, config, base, task, ranks, progress)

    def save() -> None:
        with written_whole(folder) as partial:
            policies.save(policy, partial)
            tokenizer.save(partial)
            (partial / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")

    # Another run of the same recipe may have been faster.
    if ranks.is_main and not (folder / "recipe.json").is_file():
        _write(base.cache_dir, save)
    ranks.wait()
    return folder


def _write(cache_dir: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise CheckpointError(
            f"the base model cannot be written to {cache_dir}: {error.strerror or error}; "
            "free space, or choose another base.cache_dir"
        ) from None


def build_policy(config: Config, base: BaseConfig, task: CountdownConfig) -> tuple[Policy, Tokenizer]:
    """An untrained policy of the recipe's shape, and the tokenizer of its task's words."""
    shape, tokenizer = base_shape(config, base, task)
    policy = Policy(shape)
    initialise(policy, config.seed)
    return cast_weights(policy, getattr(torch, config.dtype)), tokenizer


def base_shape(config: Config, base: BaseConfig, task: CountdownConfig) -> tuple[PolicyConfig, Tokenizer]:
    """The shape of the recipe's base model, and the tokenizer of its task's words."""
    words = [*vocabulary(task), *config.prompt_template.replace("{prompt}", " ").split()]
    context = int(base.shape.get("max_position_embeddings", DEFAULT_CONTEXT))
    tokenizer = build_word_tokenizer(words, context)
    shape = {
        "max_position_embeddings": context,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.inner.bos_token_id,
        "pad_token_id": tokenizer.inner.pad_token_id,
        **base.shape,
        "vocab_size": len(tokenizer),
    }
    return PolicyConfig.model_validate(shape), tokenizer


def train_base(
    policy: Policy,
    tokenizer: Tokenizer,
    config: Config,
    base: BaseConfig,
    task: CountdownConfig,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """AdamW with warm-up and cosine decay; every rank takes its share of each batch."""
    optimizer = MasterAdamW(policy, betas=(0.9, 0.95), eps=1e-8, weight_decay=base.weight_decay)
    with_losses = base.router_aux_loss_coef > 0 or base.router_z_loss_coef > 0
    batches = _token_batches(tokenizer, config, base, task)
    for step in range(base.max_steps):
        texts = next(batches)
        _, mine = ranks.share(texts)
        count = sum(len(text) - 1 for text in texts)
        rows = PackedRows.of([len(text) for text in mine], ranks.device)
        token_ids_N = torch.tensor([token for text in mine for token in text], device=ranks.device)
        mtp_weight = base.mtp_weight if policy.mtp and step % base.mtp_interval == 0 else 0.0
        loss = next_token_loss(policy, token_ids_N, rows, mtp_weight, RouterWatch.of(rows, with_losses=with_losses))
        share = sum(len(text) - 1 for text in mine) / count
        total = loss.total * share
        if loss.routers is not None and with_losses:
            total = total + router_loss(
                loss.routers,
                aux_loss_coef=base.router_aux_loss_coef,
                z_loss_coef=base.router_z_loss_coef,
                num_rows=len(texts),
                num_tokens=sum(map(len, texts)),
            )
        total.backward()
        ranks.sum_(optimizer.gather_gradients())
        rate = learning_rate_at(
            step, peak=base.learning_rate, warmup_steps=base.warmup_steps, max_steps=base.max_steps, kind="cosine"
        )
        optimizer.step(rate, 1.0)
        totals = RouterTotals(policy, with_mtp=mtp_weight > 0, with_losses=with_losses)
        totals.add(loss.routers, len(mine))
        totals.reduce(ranks)
        balance(policy, totals.load_ME, rate=base.bias_update_rate, mtp_rate=base.mtp_bias_update_rate)
        trunk = ranks.sum_number(float(loss.trunk) * share)
        if not math.isfinite(trunk):
            raise ConfigError(f"the base model's loss is {trunk} at step {step}; lower base.learning_rate")
        routers = router_metrics(totals.stats(policy.config.num_experts_per_tok))
        progress({"step": step + 1, "loss": trunk, "num_tokens": sum(map(len, texts)), **routers})


def _token_batches(
    tokenizer: Tokenizer, config: Config, base: BaseConfig, task: CountdownConfig
) -> Iterator[list[list[int]]]:
    """Batches of texts of like length, at most `tokens_per_step` when padded."""
    rng = random.Random(f"attempts {config.seed}")
    rows = generate_problems(task, config.seed, "train")
    ids = tokenizer.inner.get_vocab()
    texts: list[list[int]] = []
    while True:
        for row in (next(rows) for _ in range(POOL)):
            prompt = config.prompt_template.replace("{prompt}", problem_text(row["nums"], row["target"]))
            completion = write_attempts(row, task, base.attempts, rng)
            texts.append([*(ids[word] for word in f"{prompt} {completion}".split()), tokenizer.eos_token_id])
        batches = cut_by_tokens(texts, base.tokens_per_step)[:-1]
        if not batches:  # one batch takes more than a pool
            continue
        rng.shuffle(batches)  # the longest few, which fill no batch, are left out
        yield from batches
        texts.clear()
