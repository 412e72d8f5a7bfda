"""Agreement with labelled suites: ordinary answers, the cases other verifiers publish, hostile ones."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from rewards import verify_math, verify_math_many
from rewards.math_reward import warm_up

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def load(name):
    rows = [json.loads(line) for line in (DATA / f"math_{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if "repeat" in row:
            # "@@" stands for a text repeated many times, which nobody wants in a file.
            row["answer"] = row["answer"].replace("@@", row["repeat"][0] * row["repeat"][1])
    return rows


@pytest.mark.parametrize(("name", "least"), [("ordinary", 400), ("public", 300), ("hostile", 200)])
def test_agreement_with_the_labels(name, least):
    rows = [row for row in load(name) if "rejected" not in row]
    assert len(rows) >= least
    assert len({(row["answer"], row["gold"]) for row in rows}) >= 0.95 * len(rows)
    results = verify_math_many([row["answer"] for row in rows], [row["gold"] for row in rows])
    wrong = [
        (row["answer"][:80], row["gold"][:80], result.detail)
        for row, result in zip(rows, results, strict=True)
        if bool(result.reward) != row["expected"]
    ]
    false_positives = [w for w in wrong if w[2].startswith("correct")]
    assert not false_positives
    assert len(wrong) <= 0.02 * len(rows), wrong
    assert Counter(result.status for result in results)["error"] == 0


def test_every_rejected_label_has_a_reason():
    rejected = [row for row in load("public") if "rejected" in row]
    assert rejected
    assert all(len(row["rejected"]) > 15 for row in rejected)


def test_no_hostile_answer_is_slow():
    warm_up()
    slow = []
    for row in load("hostile"):
        start = time.perf_counter()
        result = verify_math(row["answer"], row["gold"])
        if time.perf_counter() - start > 3.0 or result.status == "timeout":
            slow.append(row["answer"][:60])
    assert not slow


@pytest.mark.parametrize("name", ["gsm8k_train", "asdiv", "deepmath_5k"])
def test_a_gold_equals_itself(name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    golds = {json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()}
    failed = []
    for gold in golds:
        answer = gold.rpartition("####")[2].strip()
        result = verify_math(f"Thus the answer is \\boxed{{{answer}}}.", gold)
        if result.status != "ok" or result.reward != 1.0:
            failed.append((gold, result.detail))
    assert len(failed) <= 0.005 * len(golds), failed
