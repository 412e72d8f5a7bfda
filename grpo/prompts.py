"""From a problem to the token ids that the policy continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo.config import Config
from policy.tokenizer import Tokenizer
from rewards import Problem

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)
"""DeepSeek-R1, table 1."""


class PromptError(Exception):
    """A problem that cannot be asked; the message names it and the remedy."""


def render_prompt(problem: Problem, template: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt: the tokenizer's `chat` template, `r1_zero`, or a text around {prompt}."""
    if template == "chat":
        return tokenizer.render_chat(_messages(problem.prompt))
    text = (R1_ZERO if template == "r1_zero" else template).replace("{prompt}", _text(problem.prompt))
    if unknown := tokenizer.unknown_in(text):
        raise PromptError(f"{problem.source}: the tokenizer has no word for {', '.join(map(repr, unknown[:5]))}")
    return tokenizer.encode(text)


def render_prompts(problems: Sequence[Problem], config: Config, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Token ids of each problem's prompt.

    Raises PromptError for the first that leaves no room for a completion within `context` tokens.
    """
    prompts = [render_prompt(problem, config.prompt_template, tokenizer) for problem in problems]
    for prompt_ids, problem in zip(prompts, problems, strict=True):
        if len(prompt_ids) + config.max_completion_length > context:
            raise PromptError(
                f"{problem.source}: the prompt has {len(prompt_ids)} tokens; with max_completion_length="
                f"{config.max_completion_length} that exceeds the model's context of {context}; lower the key or drop "
                "the row"
            )
    return prompts


def _messages(prompt: str | Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] for turn in prompt)
