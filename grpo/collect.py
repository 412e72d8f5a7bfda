"""Ask problems: prompts to the engine, completions to the grader as they come, both back as groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from grpo.config import Config
from grpo.prompts import render_prompts
from grpo.schedule import completion_length_at
from grpo.types import Group
from policy import Policy
from policy.tokenizer import Tokenizer
from rewards import Grader, Problem
from rollouts import Completion, Engine, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """Groups and what they cost."""

    groups: list[Group]
    """[P], in the order asked."""
    sample_s: float
    """Seconds of sampling."""
    grade_s: float
    """Seconds that grading took beyond sampling."""
    grade_busy_s: float
    """Seconds in which something was graded, while others were sampled or after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collector:
    """What stands between a problem and its graded completions, for training, evaluation and looking at a model."""

    config: Config
    tokenizer: Tokenizer
    engine: Engine
    grader: Grader
    context: int
    """Tokens that the policy can see."""

    def render(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Token ids of each problem's prompt; raises PromptError for one that leaves no room for a completion."""
        return render_prompts(problems, self.config, self.tokenizer, self.context)

    def collect(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        *,
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: Sequence[int],
    ) -> Collected:
        """`num_generations` graded completions of each problem.

        Each group goes to the grader as soon as it is sampled, while others still are. Whatever ends the sampling ends
        the grading, too.
        """
        start = perf_counter()
        texts: list[list[str]] = [[] for _ in problems]
        with self.grader.start([problem for problem in problems for _ in range(num_generations)]) as grading:

            def grade(place: int, completions: Sequence[Completion]) -> None:
                token_ids = [completion.token_ids for completion in completions]
                texts[place] = self.tokenizer.decode_many(token_ids)
                grading.add(place * num_generations, texts[place], token_ids)

            completions = self.engine.generate(prompts, num_generations, params, prompt_seeds, grade) if prompts else []
            sampled = perf_counter()
            results = grading.finish()
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
        return Collected(
            groups=groups,
            sample_s=sampled - start,
            grade_s=perf_counter() - sampled,
            grade_busy_s=grading.busy_s,
        )


def make_collector(config: Config, policy: Policy, tokenizer: Tokenizer, grader: Grader, engine: Engine) -> Collector:
    """A collector of what `engine` samples from `policy`."""
    return Collector(
        config=config,
        tokenizer=tokenizer,
        engine=engine,
        grader=grader,
        context=policy.config.max_position_embeddings,
    )


def sampling_params(
    config: Config, tokenizer: Tokenizer, *, greedy: bool = False, step: int | None = None
) -> SamplingParams:
    """How a recipe draws completions, or the most likely ones; at their full length, or at that of a training step."""
    full = config.max_completion_length
    return SamplingParams(
        max_completion_length=full if step is None else completion_length_at(step, full, config.length_schedule),
        temperature=0.0 if greedy else config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop_token_ids=(tokenizer.eos_token_id,),
        stop_strings=config.stop_strings,
        record_experts=step is not None and config.routing_replay == "sampler",
    )
