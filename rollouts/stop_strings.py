"""Where a completion ends for what it says: at the token that completes one of some texts.

A text is looked for in the completion as it reads after its prompt, with the space before its first word, which some
decoders drop where they see the completion alone. A table over the vocabulary says which tokens can complete one at
all; only after these is anything decoded, and then a few tokens back, as far as the longest reaches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policy.tokenizer import REPLACEMENT, Tokenizer
from rollouts.types import SamplingError, SamplingParams


class StopStrings:
    """Some texts as one tokenizer writes them."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        """Raises SamplingError for a text that no completion can hold."""
        pieces = tokenizer.pieces()
        _check_spelling(strings, pieces)
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        self._reach = max(map(len, strings)) - 1
        ends = tuple({text[start:] for text in strings for start in range(len(text))})
        self._can_end = np.array(
            [
                piece.startswith(ends) or REPLACEMENT in piece or any(text in piece for text in strings)
                for piece in pieces
            ]
            + [False]  # for ids beyond the tokenizer's, which say nothing, and for faults, which are -1
        )
        self._widths = np.array([0 if REPLACEMENT in piece else len(piece) for piece in pieces] + [0])

    def may_end(self, token_ids: np.ndarray) -> np.ndarray:
        """Whether a token can complete one of the texts, in the shape given."""
        found: np.ndarray = self._can_end[np.minimum(token_ids, len(self._can_end) - 1)]
        return found

    def first_end(self, token_ids: np.ndarray, first: int = 0) -> int | None:
        """How many tokens there are up to the one that completes a text, that one included; None where none does.

        Tokens before index `first` are known to complete none.
        """
        for place in (first + np.flatnonzero(self.may_end(token_ids[first:]))).tolist():
            end = place + 1
            # The whole is decoded only to confirm: bytes before the tail can make what it shows unreadable.
            if self._is_in(token_ids[self._tail(token_ids, place) : end]) and self._is_in(token_ids[:end]):
                return end
        return None

    def _is_in(self, token_ids: np.ndarray) -> bool:
        text = self._tokenizer.decode_after_text(token_ids.tolist())
        return any(string in text for string in self.strings)

    def _tail(self, token_ids: np.ndarray, place: int) -> int:
        """Index of a token far enough before `place`, which begins with a whole character."""
        reached = 0
        while place > 0 and reached < self._reach:
            place -= 1
            reached += int(self._widths[min(int(token_ids[place]), len(self._widths) - 1)])
        return place


def stop_strings_of(
    params: SamplingParams, tokenizer: Tokenizer | None, made: StopStrings | None = None
) -> StopStrings | None:
    """What finds the stop strings of a request, None where it has none; `made` again where they are still the same.

    Raises SamplingError without a tokenizer, or for a text that it cannot spell.
    """
    if not params.stop_strings:
        return None
    if tokenizer is None:
        raise SamplingError(
            f"stop_strings {list(params.stop_strings)} need a tokenizer: make_engine(policy, config, tokenizer)"
        )
    if made is not None and made.strings == params.stop_strings:
        return made
    return StopStrings(tokenizer, params.stop_strings)


def _check_spelling(strings: Sequence[str], pieces: Sequence[str]) -> None:
    distinct = set(pieces)
    has_bytes = any(REPLACEMENT in piece for piece in distinct)
    for text in strings:
        if REPLACEMENT in text or not ((has_bytes and not text.isascii()) or _is_spelled(text, distinct)):
            raise SamplingError(
                f"stop_strings: no tokens of the tokenizer spell {text!r}, so that it would never end a completion; "
                "take it out of stop_strings, or write it as it stands in a completion"
            )


def _is_spelled(text: str, pieces: set[str]) -> bool:
    """Whether pieces one after another can contain the text: it may begin inside one and end inside another."""
    if any(text in piece for piece in pieces):
        return True
    reached = {end for end in range(1, len(text)) if any(piece.endswith(text[:end]) for piece in pieces)}
    for start in range(1, len(text)):
        if start in reached:
            if any(piece.startswith(text[start:]) for piece in pieces):
                return True
            reached |= {end for end in range(start + 1, len(text)) if text[start:end] in pieces}
    return False
