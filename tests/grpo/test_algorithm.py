"""Named algorithms are rows of one table; the recipe's own keys go first."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from grpo.algorithm import PRESETS, Aggregation, AlgorithmConfig, Baseline, Clipping, Level, Name, Scale
from grpo.config import ConfigError, load_config
from tests.recipes import write_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_a_row_for_every_name_and_each_is_a_valid_choice_of_its_own() -> None:
    assert PRESETS.keys() == set(get_args(Name))
    chosen = [AlgorithmConfig(algorithm=name).model_dump(exclude={"algorithm"}) for name in PRESETS]
    assert all(a != b for i, a in enumerate(chosen) for b in chosen[:i])


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_sets_just_its_keys(name: str) -> None:
    default, chosen = AlgorithmConfig().model_dump(), AlgorithmConfig(algorithm=name).model_dump()  # type: ignore[arg-type]
    changed = {key: value for key, value in chosen.items() if value != default[key]}
    assert changed == {"algorithm": name, **PRESETS[name]}


def test_a_key_of_the_recipe_goes_before_the_row(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path, algorithm="dapo", epsilon_high=0.3))
    assert (config.epsilon_high, config.mask_truncated_completions) == (0.3, True)
    assert load_config(write_recipe(tmp_path), ["algorithm=gspo"]).importance_sampling_level == "sequence"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"algorithm": "drgrpo"}, "algorithm: Input should be 'grpo', 'dr_grpo', 'dapo'"),
        ({"clipping": "cispo"}, "clipping cispo needs epsilon_high"),
        ({"importance_sampling_level": "geometric_mean", "clipping": "none"}, "it needs clipping ppo, got none"),
        ({"importance_sampling_level": "sequence", "clipping": "dppo_tv"}, "it needs importance_sampling_level token"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "it needs baseline group_mean, scale_rewards group, kl_in loss and soft_punish_cache 0",
        ),
        ({"entropy_coef_min": 2}, "entropy_coef_min (2.0) is above entropy_coef_max (1.0)"),
        ({"importance_sampling_clip_min": 4}, "(4.0) must be below importance_sampling_clip_max (3.0)"),
        (
            {"importance_sampling_correction": "token_truncate", "importance_sampling_clip_max": None},
            "importance_sampling_correction token_truncate needs importance_sampling_clip_max",
        ),
        ({"sync_ref_model": True}, "sync_ref_model has no reference to move: set beta above 0"),
        ({"soft_punish_cache": 17}, "soft_punish_cache (17) is above max_completion_length (16)"),
        ({"num_minibatches": 3}, "num_minibatches (3) is above prompts_per_step (2)"),
        ({"delta": 0.5}, "delta: Input should be greater than 1"),
    ],
)
def test_choices_that_do_not_go_together_are_named(choices: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = [f"{key}={'null' if value is None else value}" for key, value in choices.items()]
    with pytest.raises(ConfigError) as caught:
        load_config(write_recipe(tmp_path), settings)
    assert message in str(caught.value)


def test_the_table_in_the_docs_is_the_table() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    text = text.partition("## Named algorithms")[2].partition("## The choices")[0]
    rows = {found[1]: found[2] for found in re.finditer(r"^\| `(\w+)` \| (`.*?`) \|", text, re.MULTILINE)}
    for name, choices in PRESETS.items():
        said = dict(item.split(": ", 1) for item in re.findall(r"`([^`]+)`", rows[name]))
        assert {key: yaml.safe_load(value) for key, value in said.items()} == choices, name


def test_the_docs_name_every_choice_and_every_file() -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    assert [key for key in AlgorithmConfig.model_fields if key not in text] == []
    values = [value for kind in (Baseline, Scale, Level, Clipping, Aggregation) for value in get_args(kind)]
    assert [value for value in values if f"`{value}`" not in text] == []
    files = set(re.findall(r"`((?:grpo|tests)/[\w/]+\.py)`", text))
    assert [file for file in files if not (ROOT / file).is_file()] == []
