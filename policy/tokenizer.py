"""Text to token ids and back, always through a Hugging Face tokenizer.

`load_tokenizer` reads any tokenizer folder; `build_word_tokenizer` makes a small one of whole words for policies
trained from nothing. Code of a hub repository is never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from policy.gguf import GgufError, find_gguf

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in a decoded text for bytes that are no whole character."""


class TokenizerError(Exception):
    """A tokenizer that cannot be read, or text that it cannot hold."""


class Tokenizer:
    """The few things that training asks of a tokenizer."""

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self.inner = inner
        if inner.eos_token_id is None:
            raise TokenizerError("the tokenizer names no end-of-sequence token; set eos_token in tokenizer_config.json")
        self.eos_token_id: int = inner.eos_token_id

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return len(self.inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of text, with no special tokens added around it."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; the end-of-sequence and padding tokens are left out."""
        hidden = {self.eos_token_id, self.inner.pad_token_id}
        text: str = self.inner.decode(
            [i for i in token_ids if i not in hidden], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def decode_many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row) for row in rows]

    def decode_after_text(self, token_ids: Sequence[int]) -> str:
        """What tokens add to a text that has begun. Some decoders drop the space before the first word of a text, which
        `decode` then lacks; a reader of prompt and completion sees it.
        """
        token, before = self._beginning
        return self.decode([token, *token_ids])[len(before) :]

    def pieces(self) -> list[str]:
        """What each token adds to a text that has begun, [len(self)]; REPLACEMENT where it ends or begins inside a
        character, or where it changes what stands before it.
        """
        first, before = self._beginning
        texts = self.decode_many([[first, token] for token in range(len(self))])
        return [text[len(before) :] if text.startswith(before) else REPLACEMENT for text in texts]

    @cached_property
    def _beginning(self) -> tuple[int, str]:
        """A token that says something readable, and what it says."""
        for token in (*self.encode("a")[-1:], *range(len(self))):
            if (text := self.decode([token])).strip() and REPLACEMENT not in text:
                return token, text
        raise TokenizerError("the tokenizer has no token that says anything by itself")

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the tokenizer's own chat template, opened for the assistant's turn."""
        if not self.inner.chat_template:
            raise TokenizerError("this tokenizer has no chat template; set prompt_template to 'r1_zero' or to a text")
        rendered: Any = self.inner.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
        )
        return self.encode(rendered)

    def unknown_in(self, text: str) -> list[str]:
        """Words of text that the vocabulary lacks (always empty for byte-level tokenizers)."""
        unknown = self.inner.unk_token_id
        if unknown is None or unknown not in self.encode(text):
            return []
        return sorted({word for word in text.split() if unknown in self.encode(word)})

    def save(self, folder: Path | str) -> None:
        """Write the Hugging Face tokenizer files."""
        self.inner.save_pretrained(str(folder))


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer in a Hugging Face folder, or in a GGUF file (or a folder with nothing else)."""
    try:
        file = find_gguf(Path(folder))
        options = {"gguf_file": file.name} if file else {}
        place = str(file.parent if file else folder)
        return Tokenizer(AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options))
    except (OSError, ValueError, ImportError, GgufError) as error:
        raise TokenizerError(f"no tokenizer can be read from {folder}: {str(error).splitlines()[0]}") from None


def build_word_tokenizer(words: Sequence[str], max_length: int) -> Tokenizer:
    """A tokenizer whose tokens are the given words, separated by white space.

    Whole words make a number one token, so that a small policy need not learn place value first.
    """
    vocabulary: dict[str, int] = {}
    for word in (PAD, BOS, EOS, UNKNOWN, *words):
        vocabulary.setdefault(word, len(vocabulary))
    raw = RawTokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
    )
    return Tokenizer(fast)
