"""Completions that end for what they say: the search against decoding everything, and the engine against the search."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from policy.tokenizer import REPLACEMENT, Tokenizer
from rollouts import EngineConfig, SamplingError, SamplingParams, make_engine
from rollouts.builtin_engine import BuiltinEngine
from rollouts.stop_strings import StopStrings
from tests.policies import tiny_policy
from tests.tokenizer_kinds import byte_tokenizer, piece_tokenizer, word_tokenizer

TOKENIZERS = [byte_tokenizer, piece_tokenizer, word_tokenizer]
PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8]


def naive_end(tokenizer: Tokenizer, token_ids: Sequence[int], strings: Sequence[str]) -> int | None:
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode_after_text(token_ids[:end])
        if any(string in text for string in strings):
            return end
    return None


@pytest.mark.parametrize("make", TOKENIZERS)
def test_the_search_is_that_through_the_whole_text(make: Callable[[], Tokenizer]) -> None:
    """Over random tokens, which break characters and words in every way; texts are cut out of what such tokens say."""
    tokenizer, rng = make(), np.random.default_rng(0)
    favourites = rng.integers(0, len(tokenizer), 12)
    found = straddling = 0
    for _ in range(150):
        token_ids = rng.choice(favourites, 40) if rng.integers(2) else rng.integers(0, len(tokenizer), 40)
        text = tokenizer.decode(rng.choice(token_ids, 30).tolist() if rng.integers(2) else token_ids[20:].tolist())
        start = int(rng.integers(len(text)))
        string = text[start : start + int(rng.integers(1, 9))].strip(REPLACEMENT)
        if not string or REPLACEMENT in string:
            continue
        wanted = naive_end(tokenizer, token_ids.tolist(), [string])
        assert StopStrings(tokenizer, [string]).first_end(token_ids) == wanted, (string, token_ids)
        found += wanted is not None
        straddling += wanted is not None and string not in tokenizer.decode(token_ids[wanted - 1 : wanted].tolist())
    assert found > 30
    assert straddling > 10


def test_the_first_of_several_ends_it_and_what_was_looked_at_is_not_again() -> None:
    tokenizer = byte_tokenizer()
    token_ids = np.array(tokenizer.encode("So the answer is 42 . </answer> and so on</answer>"))
    stops = StopStrings(tokenizer, ["</answer>", "and so"])
    end = stops.first_end(token_ids)
    assert end is not None
    assert tokenizer.decode(token_ids[:end].tolist()).endswith("</answer>")
    later = stops.first_end(token_ids, end)
    assert later is not None
    assert "and so" in tokenizer.decode(token_ids[:later].tolist())
    assert stops.first_end(token_ids[:end], end) is None
    assert stops.first_end(np.array([-1, 10**6])) is None, (
        "neither a fault nor an id beyond the vocabulary says anything"
    )


@pytest.mark.parametrize(
    ("make", "alone"),
    [(byte_tokenizer, " the answer"), (piece_tokenizer, "the answer"), (word_tokenizer, "the answer")],
)
def test_a_text_may_begin_with_the_space_before_the_first_word(make: Callable[[], Tokenizer], alone: str) -> None:
    tokenizer = make()
    pieces = tokenizer.pieces()
    completion = [
        pieces.index(" the"),
        *([pieces.index(" answer")] if " answer" in pieces else tokenizer.encode(" answer")),
    ]
    assert tokenizer.decode(completion) == alone
    assert tokenizer.decode_after_text(completion) == " the answer"
    for string, end in ((" the", 1), (" the answer", len(completion)), (" answer the", None)):
        assert StopStrings(tokenizer, [string]).first_end(np.array(completion)) == end


def test_few_tokens_are_decoded() -> None:
    tokenizer = byte_tokenizer()
    stops = StopStrings(tokenizer, ["</answer>"])
    assert stops.may_end(np.arange(len(tokenizer))).sum() < 0.6 * len(tokenizer)  # half of it is parts of characters
    readable = np.array(tokenizer.encode("So the answer is 42 and so on the end"))
    assert not stops.may_end(readable).any()


@pytest.mark.parametrize(("num_drafts", "stop_token_ids"), [(0, ()), (2, range(3, 300, 9))], ids=["plain", "drafting"])
@pytest.mark.parametrize("make", TOKENIZERS)
def test_the_engine_ends_completions_where_the_search_says(
    make: Callable[[], Tokenizer], num_drafts: int, stop_token_ids: Sequence[int]
) -> None:
    tokenizer = make()
    policy = tiny_policy(vocab_size=len(tokenizer), num_nextn_predict_layers=1)
    speculative = {"num_speculative_tokens": num_drafts, "max_batch": 100}
    config = EngineConfig.model_validate({"block_size": 4, "max_num_seqs": 8, "speculative": speculative})
    engine = BuiltinEngine(policy, config, tokenizer)
    params = SamplingParams(max_completion_length=24, stop_token_ids=tuple(stop_token_ids), seed=3)
    unbounded = engine.generate(PROMPTS, 4, params)
    texts = [tokenizer.decode_after_text(c.token_ids) for group in unbounded for c in group]
    middles = sorted({text[at : at + 4] for text in texts for at in range(3, len(text) - 4)})
    readable = [middle for middle in middles if REPLACEMENT not in middle]
    strings = tuple(readable[:: len(readable) // 4 + 1])
    groups = engine.generate(PROMPTS, 4, replace(params, stop_strings=strings))
    stopped = 0
    for ours, whole in zip((c for g in groups for c in g), (c for g in unbounded for c in g), strict=True):
        end = naive_end(tokenizer, whole.token_ids, strings)
        stopped += end is not None
        assert ours.token_ids == whole.token_ids[:end]
        assert ours.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-5)
        assert ours.finish_reason == (whole.finish_reason if end is None else "stop")
    assert 0 < stopped < 12


@pytest.mark.parametrize(
    ("make", "string"),
    [
        (byte_tokenizer, f"{REPLACEMENT}!"),
        (word_tokenizer, "<eos>"),  # of which decoding says nothing
        (word_tokenizer, "question"),
        (word_tokenizer, "the  end"),
        (word_tokenizer, "naïv€"),
    ],
)
def test_a_text_that_no_completion_can_hold_is_refused(make: Callable[[], Tokenizer], string: str) -> None:
    tokenizer = make()
    engine = make_engine(tiny_policy(vocab_size=len(tokenizer)), EngineConfig(), tokenizer)
    with pytest.raises(SamplingError, match=f"stop_strings: no tokens of the tokenizer spell '{string}'"):
        engine.generate([[5]], 1, SamplingParams(max_completion_length=4, stop_strings=("the", string)))


@pytest.mark.parametrize(
    ("make", "string"),
    [(byte_tokenizer, "水!"), (word_tokenizer, "swer is 4"), (word_tokenizer, "the"), (piece_tokenizer, "\n\n水")],
)
def test_a_text_that_some_tokens_spell_is_not(make: Callable[[], Tokenizer], string: str) -> None:
    StopStrings(make(), [string])


def test_an_empty_text_is_refused_and_so_is_any_without_a_tokenizer() -> None:
    with pytest.raises(SamplingError, match=r"stop_strings must not hold an empty text, got \['a', ''\]"):
        SamplingParams(max_completion_length=4, stop_strings=("a", ""))
    with pytest.raises(SamplingError, match=r"\['the'\] need a tokenizer: make_engine\(policy, config, tokenizer\)"):
        make_engine(tiny_policy(), EngineConfig()).generate(
            [[5]], 1, SamplingParams(max_completion_length=4, stop_strings=("the",))
        )
