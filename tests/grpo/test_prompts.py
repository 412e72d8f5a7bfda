"""Prompts: what stands around a question, and questions that cannot be asked."""

from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config, load_config
from grpo.countdown import CountdownConfig, problem_text, vocabulary
from grpo.prompts import R1_ZERO, PromptError, render_prompt, render_prompts
from policy.tokenizer import Tokenizer, TokenizerError, build_word_tokenizer
from rewards import Problem
from tests.recipes import write_recipe

TEMPLATE = "User : {prompt} Assistant :"


def tokenizer(*words: str) -> Tokenizer:
    return build_word_tokenizer([*vocabulary(CountdownConfig(max_value=30)), *words], 64)


def problem(prompt: Any = "Using the numbers 1 2 , make 3 .") -> Problem:
    return Problem(id="1", prompt=prompt, source="data.jsonl:3")


def config(tmp_path: Path, **changes: Any) -> Config:
    return load_config(write_recipe(tmp_path, **changes))


def test_a_template_goes_around_the_question() -> None:
    words = tokenizer()
    ids = render_prompt(problem(), TEMPLATE, words)
    assert words.decode(ids) == "User : Using the numbers 1 2 , make 3 . Assistant :"
    assert words.eos_token_id not in ids


def test_braces_in_a_question_are_left_alone() -> None:
    words = tokenizer("{0}", "{x}", "{prompt")
    assert words.decode(render_prompt(problem("make {0} {x} {prompt"), TEMPLATE, words)) == (
        "User : make {0} {x} {prompt Assistant :"
    )


def test_r1_zero_is_the_published_template() -> None:
    text = R1_ZERO.replace("{prompt}", "What is 1 + 1?")
    words = build_word_tokenizer(text.split(), 64)
    assert words.decode(render_prompt(problem("What is 1 + 1?"), "r1_zero", words)) == text
    assert R1_ZERO.count("{prompt}") == 1
    assert R1_ZERO.endswith("Assistant:")


def test_messages_are_joined_in_a_text_template() -> None:
    messages = [{"role": "system", "content": "make"}, {"role": "user", "content": "3"}]
    words = tokenizer()
    assert words.decode(render_prompt(problem(messages), TEMPLATE, words)) == "User : make 3 Assistant :"


def test_chat_uses_the_tokenizers_own_template() -> None:
    words = tokenizer("user:", "assistant:")
    words.inner.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert words.decode(render_prompt(problem("make 3"), "chat", words)) == "user: make 3 assistant:"
    turns = [{"role": "user", "content": "make"}, {"role": "assistant", "content": "3"}]
    assert words.decode(render_prompt(problem(turns), "chat", words)) == "user: make assistant: 3 assistant:"


def test_chat_without_a_template_says_what_to_set() -> None:
    with pytest.raises(TokenizerError, match="set prompt_template to 'r1_zero' or to a text"):
        render_prompt(problem(), "chat", tokenizer())


def test_words_that_the_tokenizer_lacks_are_named_with_the_row() -> None:
    with pytest.raises(PromptError, match=r"^data.jsonl:3: the tokenizer has no word for '31', 'sing'$"):
        render_prompt(problem("sing the numbers 1 31"), TEMPLATE, tokenizer())


def test_a_prompt_may_fill_the_context_to_the_last_token_and_no_further(tmp_path: Path) -> None:
    words = tokenizer()
    length = len(render_prompt(problem(), TEMPLATE, words))
    settings = config(tmp_path, max_completion_length=20)
    [ids] = render_prompts([problem()], settings, words, context=length + 20)
    assert len(ids) == length
    with pytest.raises(PromptError) as caught:
        render_prompts([problem()], settings, words, context=length + 19)
    assert str(caught.value) == (
        f"data.jsonl:3: the prompt has {length} tokens; with max_completion_length=20 that exceeds the model's context "
        f"of {length + 19}; lower the key or drop the row"
    )


def test_the_one_row_that_is_too_long_is_named(tmp_path: Path) -> None:
    rows = [problem(), Problem(id="2", prompt=problem_text([1] * 40, 3), source="data.jsonl:9")]
    with pytest.raises(PromptError, match=r"^data.jsonl:9: the prompt has 51 tokens"):
        render_prompts(rows, config(tmp_path), tokenizer(), context=64)
