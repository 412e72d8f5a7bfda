"""Problems from every kind of file; a bad row is named by file and row; a closed network is said in seconds."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from grpo.config import DatasetConfig
from grpo.countdown import CountdownConfig
from grpo.data import Dataset, DatasetError, read_problems, to_problem
from rewards import Problem

GSM8K = [
    {"question": "Natalia sold 48 clips in April and half as many in May. How many?", "answer": "48/2 = 24\n#### 72"},
    {"question": "Weng earns $12 an hour. How much for 50 minutes?", "answer": "12/60*50\n#### 10"},
]


def write_rows(file: Path, rows: list[Any]) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(file))
    return file


def read(file: Path | str, *, split: str = "all", count: int = 100, **settings: Any) -> list[Problem]:
    return read_problems(DatasetConfig(path=str(file), **settings), seed=0, split=split, count=count)  # type: ignore[arg-type]


def refusal(file: Path | str, **settings: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        read(file, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_columns_are_chosen_by_their_keys_in_every_format(ending: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / f"train{ending}", GSM8K)
    problems = read(file, prompt_column="question")
    assert [problem.prompt for problem in problems] == [row["question"] for row in GSM8K]
    assert [problem.answer for problem in problems] == [row["answer"] for row in GSM8K]
    assert [problem.source for problem in problems] == [f"{file}:1", f"{file}:2"]
    assert problems[1].columns == GSM8K[1]
    assert read(file, prompt_column="question", answer_column="question")[0].answer == GSM8K[0]["question"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_rows_of_numbers_and_a_target_are_countdown_problems(ending: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / f"countdown{ending}", [{"nums": [3, 5, 8], "target": 16}])
    [problem] = read(file)
    assert problem.prompt == "Using the numbers 3 5 8 , make 16 ."
    assert problem.answer == "16"
    assert problem.columns == {"nums": [3, 5, 8], "target": 16}


def test_a_row_may_hold_messages_an_id_and_its_own_reward(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    row = {"id": 7, "prompt": messages, "answer": 2, "reward": "format"}
    [problem] = read(write_rows(tmp_path / "a.jsonl", [row]))
    assert (problem.id, problem.prompt, problem.answer, problem.reward) == ("7", messages, "2", "format")


def test_one_row_in_eight_is_held_out_and_no_row_is_in_both_parts(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": f"question {n}"} for n in range(20)])
    parts = {split: [problem.source for problem in read(file, split=split)] for split in ("train", "held_out", "all")}
    assert parts["held_out"] == [f"{file}:8", f"{file}:16"]
    assert len(parts["train"]) == 18
    assert sorted(parts["train"] + parts["held_out"]) == sorted(parts["all"])
    assert [problem.source for problem in read(file, split="train", count=3)] == parts["train"][:3]


def test_held_out_rows_do_not_depend_on_how_many_are_trained_on(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": f"question {n}"} for n in range(80)])
    assert len(read(file, split="held_out", num_problems=4)) == 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "?"},
            "column 'prompt' must hold a question, got None (columns: question; set dataset.prompt_column)",
        ),
        ({"prompt": " "}, "column 'prompt' must hold a question, got ' '"),
        ({"prompt": 3}, "column 'prompt' must hold a question, got 3"),
        ({"prompt": []}, "column 'prompt' must hold messages with 'role' and 'content'"),
        ({"prompt": [{"role": "user"}]}, "column 'prompt' must hold messages with 'role' and 'content'"),
        (
            {"prompt": [{"role": "user", "content": None}]},
            "column 'prompt' must hold messages with 'role' and 'content'",
        ),
        ({"prompt": "?", "reward": 0.5}, "column 'reward' must name a reward function, got 0.5; rename the column"),
        ({"nums": [], "target": 3}, "column 'nums' must be a list of whole numbers, got []"),
        ({"nums": [1, "2"], "target": 3}, "column 'nums' must be a list of whole numbers, got [1, '2']"),
        ({"nums": [1, True], "target": 3}, "column 'nums' must be a list of whole numbers, got [1, True]"),
        ({"nums": "1 2", "target": 3}, "column 'nums' must be a list of whole numbers, got '1 2'"),
        ({"nums": [1, 2], "target": 3.5}, "column 'target' must be a whole number, got 3.5"),
        ("text", "a row must be an object, got str"),
        (None, "a row must be an object, got NoneType"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_bad_row_is_named_by_file_and_row(row: Any, message: str, ending: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / f"a{ending}", [{"prompt": "fine"}, row])
    assert refusal(file).startswith(f"{file}:2: {message}")


def test_a_bad_row_of_parquet_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", [{"prompt": "fine"}, {"prompt": None}])
    assert refusal(file).startswith(f"{file}:2: column 'prompt' must hold a question, got None")


def test_the_number_of_a_row_is_its_line_even_after_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "fine"}\n\n\n{"prompt": ""}\n')
    assert refusal(file).startswith(f"{file}:4: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "fine"}\n{"prompt": "cut o', ":2: not valid JSON"),
        ("a.json", b'[{"prompt": "fine"},\n {"prompt": ]', ":2: not valid JSON"),
        ("a.json", b'{"prompt": "fine"}\n{"prompt": "fine"}\n', "(a row a line? name it .jsonl)"),
        ("a.json", b'{"prompt": "fine"}', "must hold a list of rows, got dict"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "cannot be read: 'utf-8' codec can't decode"),
        ("a.parquet", b"PAR1 but nothing more", "cannot be read as parquet: "),
        ("a.jsonl", b"\n\n", "is empty; nothing can be asked"),
        ("a.json", b"[]", "is empty; nothing can be asked"),
        ("a.csv", b"prompt\nfine\n", "must end in .jsonl, .json, .parquet (key dataset.path)"),
    ],
)
def test_files_that_cannot_be_read_say_why(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    answer = refusal(tmp_path / name)
    assert message in answer
    assert str(tmp_path / name) in answer


def test_an_empty_parquet_file_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"prompt": []}).to_parquet(str(tmp_path / "a.parquet"))
    assert "is empty; nothing can be asked" in refusal(tmp_path / "a.parquet")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    for missing in (tmp_path / "gone.jsonl", "gone.parquet"):
        assert refusal(missing) == f"no dataset file {str(missing)!r} (looked from {Path.cwd()}; key dataset.path)"


def test_too_few_rows_to_hold_one_out_says_what_to_set(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "?"}] * 5)
    message = refusal(file, split="held_out")
    assert "has 5 rows, and none for the held_out part" in message
    assert "evaluation.num_problems=0" in message


def test_an_id_that_no_hub_gives_is_refused_in_seconds() -> None:
    """No network here, or no such dataset there: either way one line, and not after half a minute of trying."""
    import datasets  # noqa: F401 - its import is not what is timed

    started = time.monotonic()
    message = refusal("no-such-owner-2f9c/no-such-dataset-2f9c")
    assert time.monotonic() - started < 15
    assert "'no-such-owner-2f9c/no-such-dataset-2f9c' is n" in message
    assert ".jsonl, .json, .parquet" in message
    assert "dataset.path" in message


def test_held_out_countdown_problems_are_all_different() -> None:
    config = DatasetConfig(countdown=CountdownConfig(high=12))
    problems = read_problems(config, seed=0, split="held_out", count=100)
    assert len({(*sorted(p.columns["nums"]), p.columns["target"]) for p in problems}) == 100
    assert len({p.id for p in problems}) == 100


def test_too_few_different_countdown_problems_says_how_many_there_are() -> None:
    config = DatasetConfig(countdown=CountdownConfig(num_numbers=2, high=5, operators="+-"))
    with pytest.raises(
        DatasetError, match=r"about (\d+) different problems .* set evaluation.num_problems=\1$"
    ) as caught:
        read_problems(config, seed=0, split="held_out", count=500)
    some = int(str(caught.value).rpartition("=")[2])
    assert len(read_problems(config, seed=0, split="held_out", count=some)) == some


def test_the_order_follows_from_the_seed_alone_and_every_epoch_asks_everything_once() -> None:
    problems = [Problem(id=str(n), prompt="?") for n in range(7)]
    one, other = Dataset(problems, seed=3), Dataset(problems, seed=3)
    whole = [problem.id for problem in one.take(0, 21)]
    pieces = [problem.id for start, count in ((14, 7), (0, 5), (5, 9)) for problem in other.take(start, count)]
    assert pieces == whole[14:] + whole[:14]
    epochs = [whole[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == [str(n) for n in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [problem.id for problem in Dataset(problems, seed=4).take(0, 21)] != whole


def test_a_dataset_of_nothing_is_refused() -> None:
    with pytest.raises(DatasetError, match="empty"):
        Dataset([], 0)


def test_messages_and_countdown_columns_are_told_apart_by_the_prompt_column() -> None:
    row = {"nums": [1, 2], "target": 3, "prompt": "Make 3 of 1 and 2"}
    assert to_problem(row, DatasetConfig(path="a.jsonl"), "a:1").prompt == "Make 3 of 1 and 2"
