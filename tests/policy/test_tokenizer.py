"""Text to ids and back, with real tokenizers made on the spot."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from policy.tokenizer import BOS, EOS, PAD, UNKNOWN, Tokenizer, TokenizerError, build_word_tokenizer, load_tokenizer

WORDS = ["1", "2", "12", "+", "=", "<think>", "</think>", "try"]
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: it can hold any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def test_words_are_one_token_each_and_come_back() -> None:
    tokenizer = build_word_tokenizer(WORDS, max_length=64)
    assert len(tokenizer) == 4 + len(WORDS)
    ids = tokenizer.encode("<think> 12 + 1 = 2 </think>")
    assert ids == [4 + WORDS.index(word) for word in ("<think>", "12", "+", "1", "=", "2", "</think>")]
    assert tokenizer.decode(ids) == "<think> 12 + 1 = 2 </think>"
    assert tokenizer.decode_many([ids[:2], []]) == ["<think> 12", ""]


def test_special_tokens_come_first_and_words_given_twice_count_once() -> None:
    tokenizer = build_word_tokenizer([*WORDS, "1", EOS], max_length=64)
    assert len(tokenizer) == 4 + len(WORDS)
    assert tokenizer.inner.convert_ids_to_tokens([0, 1, 2, 3]) == [PAD, BOS, EOS, UNKNOWN]
    assert tokenizer.eos_token_id == 2


def test_encode_adds_nothing_and_decode_hides_only_end_and_padding() -> None:
    tokenizer = build_word_tokenizer(WORDS, max_length=64)
    assert tokenizer.encode("") == []
    assert tokenizer.decode([*tokenizer.encode("1 2"), 2, 0, 0]) == "1 2"
    assert tokenizer.decode([1, *tokenizer.encode("1 2")]) == f"{BOS} 1 2"


def test_unknown_words_are_named() -> None:
    tokenizer = build_word_tokenizer(WORDS, max_length=64)
    assert tokenizer.unknown_in("1 + 2 = 12") == []
    assert tokenizer.unknown_in("zebra + 2 = 13 zebra") == ["13", "zebra"]
    assert Tokenizer(byte_tokenizer(eos_token="<eos>")).unknown_in("zebra ∑ \x00") == []


@pytest.mark.parametrize(
    "text", ["a  b", " lead and trail ", "tabs\tand\nnewlines\n", "∑ é 漢字 🙂", "x .  y , don 't"]
)
def test_byte_level_text_comes_back_exactly(text: str) -> None:
    tokenizer = Tokenizer(byte_tokenizer(eos_token="<eos>"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(WORDS, max_length=64)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "<think> try 12 + zebra </think>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (len(again), again.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)


def test_chat_template_opens_the_assistants_turn() -> None:
    inner = byte_tokenizer(eos_token="<eos>")
    inner.chat_template = CHAT
    tokenizer = Tokenizer(inner)
    ids = tokenizer.render_chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}])
    assert tokenizer.decode(ids) == "[system] be brief\n[user] 1+1?\n[assistant]"


def test_no_chat_template_says_what_to_set() -> None:
    with pytest.raises(TokenizerError, match="no chat template; set prompt_template"):
        build_word_tokenizer(WORDS, max_length=64).render_chat([{"role": "user", "content": "1"}])


def test_no_end_token_says_what_to_set() -> None:
    with pytest.raises(TokenizerError, match="set eos_token in tokenizer_config.json"):
        Tokenizer(byte_tokenizer())


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match="no tokenizer can be read from .*empty"):
        load_tokenizer(tmp_path / "empty")
