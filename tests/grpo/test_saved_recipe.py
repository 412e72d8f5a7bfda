"""A run whose recipe is of another version: what it lacks is filled in and said, what it says otherwise is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config import Config, ConfigError, load_config
from grpo.record import RunFolder, RunFolderError
from grpo.saved_recipe import ABSENT, compare
from tests.recipes import TINY, write_recipe

DENSE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def recipe(tmp_path: Path, **changes: Any) -> Config:
    return load_config(write_recipe(tmp_path, **changes))


def saved(config: Config, *lacking: str) -> dict[str, Any]:
    """What a version without these keys wrote of it."""
    values = yaml.safe_load(config.to_yaml())
    for key in lacking:
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        del section[last]
    return values


def test_nothing_is_said_of_a_recipe_of_this_version(tmp_path: Path) -> None:
    config = recipe(tmp_path, curriculum={}, lora={"r": 4}, algorithm="dapo")
    compared = compare(saved(config), config)
    assert (compared.filled, compared.differing) == ({}, {})


def test_a_key_that_is_lacking_is_what_its_default_says(tmp_path: Path) -> None:
    config = recipe(tmp_path, curriculum={})
    lacking = ("share_prompts", "engine.speculative", "engine.run_ahead", "curriculum.memory", "stop_timeout")
    compared = compare(saved(config, *lacking), config)
    assert compared.filled == {
        "share_prompts": True,
        "engine.speculative": {"num_speculative_tokens": 0, "max_batch": 32},
        "engine.run_ahead": 8,
        "curriculum.memory": 0.5,
    }
    assert not compared.differing
    assert compared.describe_filled().startswith("share_prompts: true, curriculum.memory: 0.5, engine.run_ahead: 8, ")


def test_a_key_that_is_lacking_and_asked_for_otherwise_is_another_run(tmp_path: Path) -> None:
    before = saved(recipe(tmp_path), "share_prompts", "beta")
    compared = compare(before, recipe(tmp_path, share_prompts=False, beta=0.1))
    assert compared.differing == {"share_prompts": (True, False), "beta": (0.0, 0.1)}
    assert compared.overrides() == "beta=0.0 share_prompts=true"


@pytest.mark.parametrize(
    ("changes", "key", "did"),
    [
        ({}, "freeze_router", False),
        ({"base": TINY["base"] | {"shape": DENSE}}, "freeze_router", True),
        ({"dtype": "bfloat16"}, "residual_in_fp32", False),
        ({}, "residual_in_fp32", True),
    ],
    ids=["experts", "dense", "bf16", "fp32"],
)
def test_what_was_done_before_a_key_counts_where_the_default_does_otherwise(
    changes: dict[str, Any], key: str, did: bool, tmp_path: Path
) -> None:
    before = saved(recipe(tmp_path, **changes), key)
    assert compare(before, recipe(tmp_path, **changes, **{key: did})).differing == {}
    assert compare(before, recipe(tmp_path, **changes, **{key: did})).filled == {key: did}
    other = compare(before, recipe(tmp_path, **changes, **{key: not did}))
    assert other.differing == {key: (did, not did)}
    assert other.overrides() == f"{key}={str(did).lower()}"


def test_sections_and_shapes_are_compared_key_by_key(tmp_path: Path) -> None:
    wider = TINY["base"] | {"shape": TINY["base"]["shape"] | {"hidden_size": 32, "routed_scaling_factor": 2.0}}
    compared = compare(saved(recipe(tmp_path)), recipe(tmp_path, base=wider, lora={}, num_threads=2))
    assert compared.differing["base.shape.hidden_size"] == (16, 32)
    assert compared.differing["base.shape.routed_scaling_factor"] == (ABSENT, 2.0)
    assert compared.differing["lora"][0] is None
    assert "num_threads" not in compared.differing
    assert "base.shape.routed_scaling_factor: nothing there, 2.0 here" in compared.describe_differing()
    assert compared.overrides() == "", "what was not there cannot be given back by a key"


def test_a_key_of_another_version_is_named(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    before = saved(config) | {"group_filter": "signal"}
    before["engine"] |= {"swap_gib": 4}
    with pytest.raises(
        ConfigError, match=r'^this version knows no engine.swap_gib \(4 there\), group_filter \("signal"'
    ):
        compare(before, config)
    with pytest.raises(ConfigError, match=r"epsilon: Input should be greater than 0, got -1"):
        compare(saved(config) | {"epsilon": -1}, config)


def test_an_older_run_folder_is_opened_with_one_line_and_completed(tmp_path: Path) -> None:
    config = recipe(tmp_path, freeze_router=False)
    folder = config.run_dir
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.yaml").write_text(yaml.safe_dump(saved(config, "share_prompts", "freeze_router")))
    notes: list[str] = []
    for _ in range(2):
        run = RunFolder(folder, notes.append)
        run.open(config, resume=True)
        run.close()
    assert notes == [
        "the run began before these keys were there, and goes on as it was: share_prompts: true, freeze_router: false"
    ]
    assert load_config(folder / "config.yaml") == config


def test_an_older_run_folder_that_did_otherwise_is_refused_with_the_remedy(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    folder = config.run_dir
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    for values, wanted in (
        (
            saved(config, "freeze_router"),
            "other settings (freeze_router: false there, true here); resume it with its own recipe "
            "(freeze_router=false), or choose another name (name=...)",
        ),
        (
            saved(config) | {"group_filter": "signal"},
            'of another version (this version knows no group_filter ("signal" there)); resume it with the version that '
            "wrote it, or choose another name (name=...)",
        ),
    ):
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(RunFolderError) as caught:
            RunFolder(folder, print).open(config, resume=True)
        assert str(caught.value).endswith(wanted)
        assert yaml.safe_load((folder / "config.yaml").read_text()) == values
