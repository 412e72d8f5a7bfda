"""Small tokenizers of the kinds that there are, made on the spot."""

from functools import cache

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from policy.tokenizer import EOS, PAD, UNKNOWN, Tokenizer, build_word_tokenizer

TEXT = "So the answer is 42 . </answer> naïve café 😀 €5 and so on , the end .\n\nThen </answ er > it ends ."
SPECIAL = [PAD, EOS, UNKNOWN]


@cache
def byte_tokenizer() -> Tokenizer:
    """As GPT-2's and Qwen's: tokens are bytes and what training joined of them; some are parts of characters."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return _wrapped(raw)


@cache
def piece_tokenizer() -> Tokenizer:
    """As Llama-2's: pieces in which `▁` is a space, the first of a text dropped, and bytes for what no piece holds."""
    pieces = [
        "▁",
        "▁the",
        "▁answer",
        "▁is",
        "</",
        "answer",
        ">",
        "er",
        "ans",
        "w",
        "s",
        "o",
        "n",
        ".",
        "4",
        "2",
        "é",
        "▁>",
    ]
    byte_pieces = [f"<0x{byte:02X}>" for byte in sorted(set("\né€😀水!".encode()))]
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *pieces, *byte_pieces])}
    raw = RawTokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(raw)


@cache
def word_tokenizer() -> Tokenizer:
    """Our own: whole words, with spaces between them."""
    return build_word_tokenizer(sorted(set(TEXT.split())), max_length=128)


def _wrapped(raw: RawTokenizer) -> Tokenizer:
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)
    return Tokenizer(fast)
