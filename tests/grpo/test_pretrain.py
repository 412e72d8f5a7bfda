"""A base model from nothing: cached by its recipe, the same from the same recipe, never trained in vain."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import policy as policies
from grpo.config import BaseConfig, Config, ConfigError, load_config
from grpo.countdown import CountdownConfig, CountdownError, generate_problems, problem_text
from grpo.distributed import Ranks
from grpo.pretrain import _token_batches, base_model, build_policy
from grpo.prompts import PromptError
from policy import CheckpointError
from policy.tokenizer import load_tokenizer
from tests.full_disk import files_at_most
from tests.recipes import TINY, write_recipe


def make_config(tmp_path: Path, *overrides: str, **changes: Any) -> Config:
    return load_config(write_recipe(tmp_path, **changes), overrides)


def parts(config: Config) -> tuple[BaseConfig, CountdownConfig]:
    assert config.base is not None
    assert config.dataset.countdown is not None
    return config.base, config.dataset.countdown


def train(config: Config) -> tuple[Path, list[dict[str, Any]]]:
    """The model's folder, and what was reported of each step."""
    steps: list[dict[str, Any]] = []
    return base_model(config, Ranks(cpu=True), steps.append), steps


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_a_base_model_is_trained_once_and_then_taken_from_the_cache(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder, steps = train(config)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(0 < step["loss"] < 10 for step in steps)
    before = weights(folder)
    again, no_steps = train(config)
    assert (again, no_steps) == (folder, [])
    assert weights(folder) == before
    assert cached(tmp_path) == [folder.name]


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (one, _), (other, _) = (train(make_config(tmp_path / name)) for name in ("one", "other"))
    assert one.name == other.name
    assert weights(one) == weights(other)


def test_what_makes_the_model_is_part_of_its_key_and_nothing_else(tmp_path: Path) -> None:
    folder, _ = train(make_config(tmp_path))
    assert train(make_config(tmp_path, "max_steps=9", "learning_rate=1", "name=other"))[0] == folder
    for override in ("seed=1", "base.learning_rate=0.01", "dataset.countdown.high=8", "prompt_template=U {prompt} A"):
        assert train(make_config(tmp_path, override))[0] != folder, override


def routers_of(folder: Path) -> list[torch.Tensor]:
    """Biases of the trunk's one mixture of experts and of the MTP module's."""
    policy = policies.load(folder)
    layers = [*policy.moe_layers, *policy.mtp_moe_layers]
    return [bias for layer in layers if (bias := layer.gate.e_score_correction_bias) is not None]


def test_routers_are_balanced_and_their_load_is_reported(tmp_path: Path) -> None:
    folder, steps = train(make_config(tmp_path))
    trunk_E, module_E = routers_of(folder)
    assert trunk_E.abs().max() == pytest.approx(3e-3, rel=1e-4), "three steps the same way"
    assert not module_E.any()
    assert [len(step["moe/layers/max_load"]) for step in steps] == [2, 2, 2]
    assert all(1 <= step["moe/max_load"] <= 2 for step in steps)
    trunk_E, module_E = routers_of(
        train(make_config(tmp_path, "base.bias_update_rate=0", "base.mtp_bias_update_rate=0.01"))[0]
    )
    assert not trunk_E.any()
    assert 0.005 < module_E.abs().max() <= 0.0301


def test_router_losses_change_the_gradient_and_are_reported(tmp_path: Path) -> None:
    plain, _ = train(make_config(tmp_path))
    for key, figure in (("router_aux_loss_coef", "moe/balance_loss"), ("router_z_loss_coef", "moe/z_loss")):
        folder, steps = train(make_config(tmp_path, f"base.{key}=0.1"))
        assert all(step[figure] > 0 for step in steps)
        ours, theirs = (policies.load(each).moe_layers[0].gate.weight for each in (folder, plain))
        assert (ours - theirs).abs().max() > 1e-6


def test_it_learns_to_write_attempts(tmp_path: Path) -> None:
    """From even odds over the vocabulary to well below: 40 steps of a policy of some thousand weights."""
    base = TINY["base"] | {"max_steps": 40, "tokens_per_step": 1024, "learning_rate": 1e-2, "warmup_steps": 5}
    _, steps = train(make_config(tmp_path, base=base))
    assert steps[0]["loss"] > 3.5
    assert steps[-1]["loss"] < 2.5


def test_the_folder_is_a_model_with_a_tokenizer_of_its_words(tmp_path: Path) -> None:
    folder, _ = train(make_config(tmp_path))
    policy, tokenizer = policies.load(folder), load_tokenizer(folder)
    assert policy.config.vocab_size == len(tokenizer)
    assert policy.config.eos_token_id == tokenizer.eos_token_id
    assert policy.config.num_nextn_predict_layers == 1
    text = "User : Using the numbers 1 2 , make 3 . Assistant : <think> 1 + 2 = 3 right </think>"
    assert tokenizer.unknown_in(text) == []
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_dtype_is_that_of_the_recipe(tmp_path: Path) -> None:
    folder, _ = train(make_config(tmp_path, dtype="bfloat16"))
    assert policies.load(folder).dtype == torch.bfloat16


def test_text_is_of_training_problems_only_and_batches_keep_to_their_size(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    base, task = parts(config)
    _, tokenizer = build_policy(config, base, task)
    held_out = {
        problem_text(row["nums"], row["target"])
        for row in itertools.islice(generate_problems(task, 0, "held_out"), 2000)
    }
    batches = list(itertools.islice(_token_batches(tokenizer, config, base, task), 300))
    for batch in batches:
        assert len(batch) * max(map(len, batch)) <= base.tokens_per_step
        for text in batch:
            assert text[-1] == tokenizer.eos_token_id
            words = tokenizer.decode(text)
            assert words.removeprefix("User : ").partition(" Assistant :")[0] not in held_out
            assert words.endswith("</answer>")
            assert tokenizer.inner.unk_token_id not in text
    assert len({len(text) for batch in batches for text in batch}) > 1


def test_a_batch_may_be_larger_than_a_pool_of_texts(tmp_path: Path) -> None:
    config = make_config(tmp_path, "base.tokens_per_step=100000")
    base, task = parts(config)
    _, tokenizer = build_policy(config, base, task)
    batch = next(_token_batches(tokenizer, config, base, task))
    assert 90_000 < len(batch) * max(map(len, batch)) <= 100_000


def test_a_completion_that_cannot_fit_is_refused_before_training(tmp_path: Path) -> None:
    config = make_config(tmp_path, "max_completion_length=60")
    with pytest.raises(
        PromptError, match=r"^dataset.countdown: the prompt has 14 tokens; with max_completion_length=60"
    ):
        train(config)
    assert not (tmp_path / "cache").exists()


def test_settings_without_problems_are_refused_before_training(tmp_path: Path) -> None:
    config = make_config(tmp_path, dataset={"countdown": {"low": 20, "high": 30, "operators": "+", "max_value": 30}})
    with pytest.raises(CountdownError, match="gives no train problems"):
        train(config)


def test_a_cache_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    steps: list[dict[str, Any]] = []
    with pytest.raises(CheckpointError, match=r"cannot be written to .*/cache: File exists; free space, or choose"):
        base_model(make_config(tmp_path), Ranks(cpu=True), steps.append)
    assert steps == []


@pytest.mark.parametrize("size", [500, 1500, 20_000], ids=["config", "tokenizer", "weights"])
def test_a_full_disk_leaves_no_half_model(size: int, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with (
        files_at_most(size),
        pytest.raises(CheckpointError, match=r"cannot be written to .*File too large.*free space"),
    ):
        train(config)
    assert cached(tmp_path) == []
    folder, steps = train(config)
    assert len(steps) == 3
    assert (folder / "recipe.json").is_file()


def test_a_model_that_another_run_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    finished: list[bytes] = []

    def race(step: dict[str, Any]) -> None:
        if not finished:
            finished.append(b"")
            folder, _ = train(config)
            finished[0] = weights(folder)
            (folder / "mark").write_text("the first to finish")

    folder = base_model(config, Ranks(cpu=True), race)
    assert (folder / "mark").is_file()
    assert weights(folder) == finished[0]


def test_a_loss_that_blows_up_names_the_key_to_lower(tmp_path: Path) -> None:
    config = make_config(tmp_path, "base.learning_rate=1e38", "base.max_steps=6", "base.warmup_steps=0")
    with pytest.raises(ConfigError, match=r"the base model's loss is (nan|inf) at step \d; lower base.learning_rate"):
        train(config)
    assert cached(tmp_path) == []
