"""No gold equals a numerically different mutation of itself: sign, digit, exponent, order, dropped term."""

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import verify_math

SHARED = Path(__file__).parents[3] / "shared" / "data"
FALLBACK = [
    "18", "-7", "1,080", "2.5", r"\frac{3}{4}", r"-\frac{1}{3}", r"2\sqrt{3}", r"\frac{\pi}{4}", "x^2+3x-4", "(1,2)",
    "(0, 9]", "2^{98}", r"1 + \sqrt{2}", r"\{1, 23\}", "f(x) = 2x + 5", r"e^{-2}", r"\ln 3", "4 + 3i", r"2 \ln 2 - 2",
]  # fmt: skip


def golds():
    found = set(FALLBACK)
    for name in ("gsm8k_train", "asdiv", "deepmath_5k"):
        path = SHARED / f"{name}.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found |= {row["answer"].rpartition("####")[2].strip() for row in rows}
    return sorted(found)


def number(text):
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def mutations(gold, rng):
    """(kind, mutation) pairs that differ in value from the gold for certain, or are no longer the same expression."""
    is_relation = re.search(r"[=<>]|\\(le|ge|ne|equiv|in)\b", gold) is not None
    # Two binomial coefficients of different numbers may be equal.
    for match in [] if "binom" in gold else re.finditer(r"(?<![\d.,])[1-9]\d*(?![\d.])", gold):
        digits, (start, end) = match.group(), match.span()
        if gold[end : end + 1] in ("!",) or re.search(r"(aleph|omega|[A-Za-z])_\{?$", gold[:start]):
            continue
        changed = str(int(digits) + rng.randint(1, 8))
        if gold[start - 1 : start] not in (",", "!") and not re.match(r",\d|,\\!|\{,\}", gold[end:]):
            yield "digit", gold[:start] + changed + gold[end:]
    is_scalar = not is_relation and not re.search(r"[,\[\]{}]|\\(cup|text|in|pm|infty|subset|oplus|times|begin)", gold)
    if is_scalar and re.search(r"\d|\\pi|\\sqrt", gold) and number(gold) != 0:
        yield "sign", f"-({gold})"
        yield "term", f"{gold}+1"
        yield "factor", f"3({gold})"
        if number(gold) != 1:
            yield "exponent", f"({gold})^2"
    for match in re.finditer(r"\^(\d|\{\d+\})", gold):
        if match.group() not in ("^1", "^{1}") and not re.search(r"[-01]$", gold[: match.start()]):
            yield "exponent dropped", gold[: match.start()] + gold[match.end() :]
    pair = re.fullmatch(r"([(\[])([^,()]+),([^,()]+)([)\]])", gold)
    if pair and pair[2].strip() != pair[3].strip():
        yield "order", f"{pair[1]}{pair[3]},{pair[2]}{pair[4]}"
        yield "end", ("[" if pair[1] == "(" else "(") + gold[1:]
    terms = re.fullmatch(r"([^+\-=,(){}\[\]]+) ([+-]) ([^+\-=,(){}\[\]]+)", gold)
    if terms:
        yield "dropped term", terms[1]
        yield "inner sign", f"{terms[1]} {'-' if terms[2] == '+' else '+'} {terms[3]}"


def accepted_mutations(seed, most_per_gold):
    """How many mutations were graded, and those graded right."""
    rng = random.Random(seed)
    count = 0
    accepted = []
    for gold in golds():
        candidates = list(mutations(gold, rng))
        for kind, mutation in rng.sample(candidates, min(len(candidates), most_per_gold)):
            count += 1
            result = verify_math(f"\\boxed{{{mutation}}}", gold)
            if result.reward:
                accepted.append((kind, mutation, gold, result.detail))
    return count, accepted


def test_no_mutation_of_a_gold_is_right():
    count, accepted = accepted_mutations(seed=0, most_per_gold=2)
    assert count >= 30
    assert not accepted, accepted


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_mutation_of_a_gold_is_right_over_all(seed):
    count, accepted = accepted_mutations(seed, most_per_gold=1000)
    assert count >= 60
    assert not accepted, accepted
