"""Ask problems: prompts to the engine, completions to the grader, both back as groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from grpo.config import Config
from grpo.types import Group
from policy.tokenizer import Tokenizer
from rewards import Grader, Problem
from rollouts import Engine, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """Groups and what they cost."""

    groups: list[Group]
    """[P], in the order asked."""
    sample_s: float
    """Seconds of sampling."""
    grade_s: float
    """Seconds of grading."""


def collect(
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    *,
    engine: Engine,
    tokenizer: Tokenizer,
    grader: Grader,
    num_generations: int,
    params: SamplingParams,
    prompt_seeds: Sequence[int],
) -> Collected:
    """`num_generations` graded completions of each problem."""
    start = perf_counter()
    completions = engine.generate(prompts, num_generations, params, prompt_seeds) if prompts else []
    sampled = perf_counter()
    texts = [tokenizer.decode_many([c.token_ids for c in group]) for group in completions]
    results = grader.grade(
        [problem for problem in problems for _ in range(num_generations)],
        [text for group in texts for text in group],
        [c.token_ids for group in completions for c in group],
    )
    groups = [
        Group(
            problem=problem,
            prompt_ids=prompt_ids,
            completions=completions[place],
            texts=texts[place],
            results=results[place * num_generations : (place + 1) * num_generations],
        )
        for place, (problem, prompt_ids) in enumerate(zip(problems, prompts, strict=True))
    ]
    return Collected(groups=groups, sample_s=sampled - start, grade_s=perf_counter() - sampled)


def sampling_params(config: Config, tokenizer: Tokenizer, *, greedy: bool = False) -> SamplingParams:
    """How a recipe draws completions, or the most likely ones."""
    return SamplingParams(
        max_completion_length=config.max_completion_length,
        temperature=0.0 if greedy else config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop_token_ids=(tokenizer.eos_token_id,),
    )
