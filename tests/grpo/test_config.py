"""A recipe is strict: whatever is wrong in it is named, with what is allowed."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from grpo.config import Config, ConfigError, load_config
from policy.lora import LoraConfig
from tests.grpo import config_page
from tests.recipes import write_recipe

ROOT = Path(__file__).resolve().parents[2]


def sections(model: type[BaseModel], path: str = "") -> dict[str, type[BaseModel]]:
    """Every section of a recipe by its dotted path."""
    found = {path: model}
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                found |= sections(candidate, f"{path}.{name}".lstrip("."))
    return found


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_config(path).max_steps >= 1


def test_a_resolved_recipe_gives_the_same_config(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path))
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config
    assert yaml.safe_load(config.to_yaml()).keys() == Config.model_fields.keys()


def test_overrides_replace_keys_at_any_depth(tmp_path: Path) -> None:
    overrides = ["learning_rate=3e-4", "rewards=[format]", "dataset.countdown.high=7", "base.shape.hidden_size=32"]
    config = load_config(write_recipe(tmp_path), [*overrides, "engine.block_size=4"])
    assert config.learning_rate == 3e-4
    assert config.rewards == ("format",)
    assert config.dataset.countdown is not None
    assert (config.dataset.countdown.high, config.dataset.countdown.operators) == (7, "+-")
    assert config.base is not None
    assert (config.base.shape["hidden_size"], config.base.shape["v_head_dim"]) == (32, 8)
    assert config.engine.block_size == 4


def test_the_page_of_all_keys_is_true() -> None:
    assert config_page.PAGE.read_text() == config_page.page(), "run: python -m tests.grpo.config_page"


def test_an_override_may_hold_an_equals_sign(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path), ["prompt_template=a = b {prompt}"])
    assert config.prompt_template == "a = b {prompt}"


@pytest.mark.parametrize("path", sections(Config))
def test_unknown_keys_name_the_nearest_one_in_every_section(path: str, tmp_path: Path) -> None:
    known = next(iter(sections(Config)[path].model_fields))
    where = f"{path}." if path else ""
    message = refusal(write_recipe(tmp_path), f"{where}{known}x=1")
    assert f"unknown key '{where}{known}x'; did you mean '{where}{known}'?" in message


def test_an_unknown_key_like_no_other_lists_what_is_known(tmp_path: Path) -> None:
    message = refusal(write_recipe(tmp_path), "engine.zzz=1")
    assert "unknown key 'engine.zzz'; known there: block_size, cache_gib, kind" in message


def test_the_shape_is_checked_as_the_policy_checks_it(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert "did you mean 'base.shape.hidden_size'?" in refusal(recipe, "base.shape.hiden_size=8")
    assert "qk_rope_head_dim must be even" in refusal(recipe, "base.shape.qk_rope_head_dim=3")
    assert "exceeds the 4 eligible experts" in refusal(recipe, "base.shape.num_experts_per_tok=9")
    assert "base.shape.hidden_size: Input should be a valid integer" in refusal(recipe, "base.shape.hidden_size=wide")
    assert "base.shape.vocab_size comes from the task" in refusal(recipe, "base.shape.vocab_size=100")
    assert "key 'base.shape.num_attention_heads' is required" in refusal(
        recipe, "base.shape={hidden_size: 8, intermediate_size: 8}"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "max_steps=many",
            "max_steps: Input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        ("max_steps=2.5", "max_steps: Input should be a valid integer, got a number with a fractional part, got 2.5"),
        ("max_steps=0", "max_steps: Input should be greater than or equal to 1, got 0"),
        ("num_generations=1", "num_generations: Input should be greater than or equal to 2, got 1"),
        ("learning_rate=.nan", "learning_rate: Input should be a finite number, got nan"),
        ("temperature=.inf", "temperature: Input should be a finite number, got inf"),
        ("reward_weights=[1, .nan]", "reward_weights.1: Input should be a finite number, got nan"),
        ("reward_memory_mb=0", "reward_memory_mb: Input should be greater than or equal to 1, got 0"),
        ("engine.kind=vlm", "engine.kind: Input should be 'builtin', 'vllm_colocate' or 'vllm_server', got 'vlm'"),
        ("engine=builtin", "engine: Input should be a valid dictionary or instance of EngineConfig, got 'builtin'"),
        ("rewards=[1]", "rewards.0: Input should be a valid string, got 1"),
        ("rewards=[]", "rewards: Tuple should have at least 1 item"),
        ("rewards=[format, format]", "a reward is listed twice in rewards: format, format"),
        ("reward_weights=[1, 2, 3]", "reward_weights has 3 numbers for 2 rewards"),
        (
            "prompt_template=solve it",
            "prompt_template must be r1_zero, chat, or a text with {prompt} in it, got 'solve it'",
        ),
        ("prompt_template=r1_zero", "`base` needs a prompt_template with {prompt} as a word of its own"),
        ("prompt_template='Q:{prompt}'", "`base` needs a prompt_template with {prompt} as a word of its own"),
        ("name=../up", "name: String should match pattern"),
        ("dtype=float16", "dtype: Input should be 'float32' or 'bfloat16', got 'float16'"),
        ("dataset.path=a.jsonl", "dataset needs exactly one of `countdown` (generated problems) and `path`"),
        ("dataset={}", "dataset needs exactly one of `countdown` (generated problems) and `path`"),
        (
            "dataset={path: a.jsonl}",
            "`base` writes text for generated problems; give `dataset.countdown`, or a `model`",
        ),
        ("dataset.countdown.low=10", "needs low <= high <= max_value, got low=10, high=9, max_value=30"),
        ("dataset.countdown.high=31", "needs low <= high <= max_value, got low=1, high=31, max_value=30"),
        ("dataset.countdown.operators=mod", "dataset.countdown.operators: String should match pattern"),
        ("activation_recomputation=all", "activation_recomputation: Input should be 'none', 'selective' or 'full'"),
        ("lora.r=0", "lora.r: Input should be greater than or equal to 1, got 0"),
        ("lora.dropout=0.1", "unknown key 'lora.dropout'"),
        ("base=null", "the recipe names no `model` to start from and has no `base` section to train one"),
    ],
)
def test_bad_values_are_named(override: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(write_recipe(tmp_path), override)


@pytest.mark.parametrize("other", ["bias_update_rate=0.001", "mtp_weight=0.1"])
def test_adapters_leave_nothing_else_to_train(other: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert load_config(recipe, ["lora={}"]).lora == LoraConfig()
    assert "bias_update_rate and mtp_weight must be 0 beside it" in refusal(recipe, "lora={}", other)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    message = refusal(write_recipe(tmp_path), "max_step=1", "epsilon=-1", "engine.blocksize=2")
    for part in ("did you mean 'max_steps'?", "epsilon: Input should be greater than 0", "'engine.block_size'?"):
        assert part in message


def test_required_keys_are_named(tmp_path: Path) -> None:
    message = refusal(write_recipe(tmp_path, max_steps=None, dataset=None))
    assert "key 'max_steps' is required" in message
    assert "key 'dataset' is required" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps", "override 'max_steps' is not of the form a.b=value"),
        ("=3", "override '=3' is not of the form a.b=value"),
        ("max_steps.a=3", "override 'max_steps.a=3': 'max_steps' is a value, not a section"),
        ("rewards.0=format", "override 'rewards.0=format': 'rewards' is a value, not a section"),
        ("rewards=[format", "'[format' is not a YAML value"),
        ("a..b=1", "unknown key 'a'"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(write_recipe(tmp_path), override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold keys and values, got NoneType"),
        (b"- 1\n- 2\n", "must hold keys and values, got list"),
        (b"name: [1\n", "cannot be read as YAML"),
        (b"name: \xff\n", "cannot be read as YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
        (b"1: 2\nmax_steps: 3\n", "Keys should be strings"),
    ],
)
def test_files_that_are_no_recipe_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_bytes(content)
    answer = refusal(tmp_path / "odd.yaml")
    assert message in answer
    assert "odd.yaml" in answer


def test_a_missing_recipe_says_where_it_was_looked_for(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.yaml") == f"no recipe {str(tmp_path / 'gone.yaml')!r} (looked from {Path.cwd()})"
    assert "cannot be read as YAML: [Errno 21] Is a directory" in refusal(tmp_path)


def test_sections_of_what_is_asked_are_off_until_one_of_their_keys_is_given(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    plain = load_config(recipe)
    assert (plain.dynamic_sampling, plain.curriculum, plain.length_schedule, plain.replay_buffer) == (None,) * 4
    config = load_config(recipe, ["dynamic_sampling.max_rounds=2", "curriculum={}", "curriculum.shares.hard=0.3"])
    assert config.dynamic_sampling is not None
    assert (config.dynamic_sampling.max_rounds, config.dynamic_sampling.oversample) == (2, 1.0)
    assert config.curriculum is not None
    assert config.curriculum.shares.hard == 0.3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dynamic_sampling.metric=format", ""),
        ("dynamic_sampling.metric=accuracy", "metric must be one of reward, countdown, format, got 'accuracy'"),
        ("dynamic_sampling.oversample=2", "dynamic_sampling.oversample: Input should be less than 2, got 2"),
        (
            "dynamic_sampling.rounds=2",
            "did you mean 'dynamic_sampling.max_rounds'",
        ),
        (
            "length_schedule={start: 17, steps: 3}",
            "start (17) must not exceed max_completion_length (16)",
        ),
        ("length_schedule={start: 16, steps: 3}", ""),
        ("curriculum.shares.hard=0", "curriculum.shares.hard: Input should be greater than 0, got 0"),
    ],
)
def test_sections_of_what_is_asked_say_what_is_allowed(override: str, message: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    if not message:
        load_config(recipe, [override])
        return
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("engine.vllm_server.urls=[http://me:hidden-word@host:8000]", "engine.vllm_server.urls.0"),
        ("engine.vllm_server.api_key_env=sk-hidden-word-0123456789", "engine.vllm_server.api_key_env"),
        ("model=hf_hiddenword0123456789", "model"),
        ("no_such_key=hf_hiddenword0123456789", "no_such_key"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(override: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key} looks like a secret") as caught:
        load_config(write_recipe(tmp_path), [override])
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("name", ["../out", "a/b", "/etc/x", ".hidden", "..", "a\n", "a\x00b", ""])
def test_a_run_cannot_be_named_out_of_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name: "):
        load_config(write_recipe(tmp_path, name=name))
