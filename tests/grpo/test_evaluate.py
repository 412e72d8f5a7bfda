"""Evaluation: shares and intervals by hand, and nothing that depends on how the problems were dealt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from grpo.collect import make_collector, sampling_params
from grpo.config import load_config
from grpo.countdown import CountdownConfig, vocabulary
from grpo.data import read_problems
from grpo.distributed import Ranks
from grpo.evaluate import Evaluator, make_evaluator
from grpo.prompts import PromptError
from policy.tokenizer import build_word_tokenizer
from rewards import Grader, Problem
from rollouts import make_engine
from tests.policies import tiny_policy
from tests.recipes import write_recipe

REWARDS = """
def is_short(problem, completion):
    return float(len(completion.split()) < 5)

def half(problem, completion):
    return 0.5
"""


def evaluator(tmp_path: Path, **changes: Any) -> Iterator[Evaluator]:
    (tmp_path / "lengths.py").write_text(REWARDS)
    settings = {"rewards": [f"{tmp_path / 'lengths.py'}:is_short"]} | changes
    config = load_config(write_recipe(tmp_path, **settings))
    words = vocabulary(CountdownConfig(max_value=30))
    tokenizer = build_word_tokenizer(words, 64)
    policy = tiny_policy(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    problems = read_problems(config.dataset, seed=0, split="held_out", count=config.evaluation.num_problems)
    with Grader(config.rewards, num_workers=0) as grader:
        yield make_evaluator(
            make_collector(config, policy, tokenizer, grader, make_engine(policy, config.engine)),
            Ranks(cpu=True),
            problems,
        )


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Evaluator]:
    yield from evaluator(tmp_path, evaluation={"num_problems": 12, "k": 5})


def correct(evaluator: Evaluator, num_generations: int, *, greedy: bool) -> tuple[list[float], list[float]]:
    """Share of right completions and mean length of each problem, asked one problem at a time."""
    shares, lengths = [], []
    for place, prompt in enumerate(evaluator.prompts):
        alone = replace(evaluator, problems=[evaluator.problems[place]], prompts=[prompt])
        params = evaluator.greedy if greedy else evaluator.sampled
        [group] = alone._ask(alone.problems, alone.prompts, num_generations, params, [seeds_of(evaluator)[place]])
        shares.append(fmean(len(text.split()) < 5 for text in group.texts))
        lengths.append(fmean(len(c.token_ids) for c in group.completions))
    return shares, lengths


def seeds_of(evaluator: Evaluator) -> list[int]:
    from grpo.evaluate import EVALUATION_STREAM
    from rollouts.sampler import mix

    return [int(mix(evaluator.seed, EVALUATION_STREAM + place)) for place in range(len(evaluator.problems))]


def test_figures_are_those_of_the_completions(short: Evaluator) -> None:
    entry = short.run("base")
    greedy, _ = correct(short, 1, greedy=True)
    sampled, lengths = correct(short, 5, greedy=False)
    assert 0 < fmean(sampled) < 1, "a test in which all are alike shows nothing"
    assert (entry["stage"], entry["task"], entry["num_problems"], entry["k"]) == ("base", "countdown", 12, 5)
    assert entry["greedy"] == pytest.approx(fmean(greedy))
    assert entry["avg@k"] == pytest.approx(fmean(sampled))
    assert entry["pass@k"] == pytest.approx(fmean(share > 0 for share in sampled))
    assert fmean(sampled) < entry["pass@k"]
    assert entry["mean_length"] == pytest.approx(fmean(lengths))
    margin = 1.96 * stdev(sampled) / 12**0.5
    assert entry["ci95"] == pytest.approx([max(0, fmean(sampled) - margin), min(1, fmean(sampled) + margin)])


def test_it_does_not_depend_on_the_batches(short: Evaluator) -> None:
    seen: list[int] = []
    assert replace(short, batch_size=5).run("base", seen.append) == short.run("base")
    assert seen == [5, 5, 2]


def test_stages_meet_the_same_draws(short: Evaluator) -> None:
    first, second = short.run(3), short.run("final")
    assert first | {"stage": "final"} == second


def test_one_problem_has_no_narrow_interval(short: Evaluator) -> None:
    entry = replace(short, problems=short.problems[:1], prompts=short.prompts[:1]).run("base")
    assert entry["ci95"] == [0.0, 1.0]


def test_only_a_whole_score_of_the_first_reward_is_correct(tmp_path: Path) -> None:
    names = [f"{tmp_path / 'lengths.py'}:{name}" for name in ("half", "is_short")]
    [entry] = [e.run("base") for e in evaluator(tmp_path, rewards=names)]
    assert (entry["greedy"], entry["avg@k"], entry["pass@k"]) == (0.0, 0.0, 0.0)


def test_greedy_and_sampled_differ_only_in_temperature(short: Evaluator, tmp_path: Path) -> None:
    assert replace(short.greedy, temperature=short.sampled.temperature) == short.sampled
    assert short.greedy.temperature == 0
    assert short.sampled.stop_token_ids == (short.collector.tokenizer.eos_token_id,)
    config = load_config(write_recipe(tmp_path, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1))
    params = sampling_params(config, short.collector.tokenizer)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 9, 0.9, 0.1)


def test_a_problem_that_is_too_long_is_named_before_anything_is_sampled(short: Evaluator, tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path))
    policy = tiny_policy(vocab_size=len(short.collector.tokenizer), max_position_embeddings=24)
    problem = Problem(id="1", prompt="Using the numbers 1 2 , make 3 .", source="test.jsonl:4")
    collector = make_collector(
        config, policy, short.collector.tokenizer, short.collector.grader, make_engine(policy, config.engine)
    )
    with pytest.raises(PromptError, match=r"^test.jsonl:4: the prompt has 13 tokens"):
        make_evaluator(collector, short.ranks, [problem])
