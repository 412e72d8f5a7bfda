"""A checkpoint is whole or absent: torn files, a full disk, another shape, and what is kept."""

import json
import os
from pathlib import Path

import pytest
import torch

import policy as policies
from grpo.checkpoint import (
    DATA,
    MANIFEST,
    STATE,
    TRAINER,
    find_checkpoint,
    forget_checkpoints_after,
    load_checkpoint,
    read_data_state,
    save_checkpoint,
)
from grpo.optimizer import MasterAdamW
from grpo.version import VERSION, describe_change, versions
from grpo.weights import WholeWeights
from policy import CheckpointError, Policy
from policy.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraConfig, add_adapters
from policy.tokenizer import Tokenizer, build_word_tokenizer
from tests.full_disk import files_at_most
from tests.policies import tiny_policy

FILES = ["config.json", DATA, "model.safetensors", STATE, "tokenizer.json", "tokenizer_config.json", TRAINER]


def make_optimizer(policy: Policy) -> MasterAdamW:
    return MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def make_tokenizer(size: int = 61) -> Tokenizer:
    return build_word_tokenizer([f"w{n}" for n in range(size - 4)], 128)


def take_step(policy: Policy, optimizer: MasterAdamW, seed: int) -> None:
    token_ids_BS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(seed))
    policy.logits(token_ids_BS).float().square().mean().backward()
    optimizer.gather_gradients()
    optimizer.step(1e-2, 1.0)


def trained(folder: Path, steps: int, keep: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Policy, MasterAdamW]:
    """A policy and its optimizer after some steps, with a checkpoint after each."""
    policy = policies.cast_weights(tiny_policy(), dtype)
    optimizer = make_optimizer(policy)
    for step in range(1, steps + 1):
        take_step(policy, optimizer, step)
        save_checkpoint(folder, step, policy, make_tokenizer(), optimizer.state_tensors(), keep)
    return policy, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_goes_on_as_what_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    policy, optimizer = trained(tmp_path, 2, dtype=dtype)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.damaged) == (2, tmp_path / "step_000002", ())
    again = policies.cast_weights(tiny_policy(seed=1), dtype)
    other = make_optimizer(again)
    load_checkpoint(found.path, WholeWeights(again, other))
    for one, two in ((policy, optimizer), (again, other)):
        take_step(one, two, seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values(), strict=True)
    )
    before, after = optimizer.state_tensors(), other.state_tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_is_a_model_folder_with_a_list_of_what_is_in_it(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    folder = tmp_path / "step_000001"
    assert names(folder) == sorted([*FILES, MANIFEST])
    assert sorted(json.loads((folder / MANIFEST).read_text())) == sorted(FILES)
    assert policies.load(folder).config == tiny_policy().config


def test_what_the_next_questions_depend_on_comes_back_to_the_bit(tmp_path: Path) -> None:
    policy = tiny_policy()
    data = {"number": 3, "rate": 0.1 + 0.2, "logprobs": [float(torch.tensor(-1.1)), -0.0], "text": "é\n"}
    path = save_checkpoint(
        tmp_path, 1, policy, make_tokenizer(), make_optimizer(policy).state_tensors(), keep=1, data=data
    )
    assert read_data_state(path) == data
    (path / DATA).unlink()
    with pytest.raises(CheckpointError, match=r"step_000001 has no data.json: an older version wrote it"):
        read_data_state(path)


def test_a_checkpoint_says_what_wrote_it(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.versions == versions() == {"grpo-reasoning": VERSION, "torch": torch.__version__}
    assert describe_change(found.versions) is None
    assert describe_change({"grpo-reasoning": VERSION, "torch": "2.11.0"}) == (
        f"the checkpoint is of grpo-reasoning {VERSION}, torch 2.11.0; this is grpo-reasoning {VERSION}, torch "
        f"{torch.__version__}: the run goes on, but not bit for bit"
    )
    assert "of an older version, which left no name; this is grpo-reasoning" in str(describe_change({}))


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    policy = tiny_policy()
    optimizer = make_optimizer(policy)
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, policy, make_tokenizer(), optimizer.state_tensors(), keep=2)
    assert names(tmp_path) == ["step_1000000", "step_1000001"]
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1_000_001


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step_best").mkdir(parents=True)
    (tmp_path / "step_000009").write_text("a file")
    trained(tmp_path, 2, keep=1)
    forget_checkpoints_after(tmp_path, 2)
    assert names(tmp_path) == ["step_000002", "step_000009", "step_best"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "gone") is None


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_torn_file_sends_one_back_to_the_checkpoint_before(file: str, tmp_path: Path) -> None:
    trained(tmp_path, 2)
    tear(tmp_path / "step_000002" / file)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    [note] = found.damaged
    what = "no readable manifest.json" if file == MANIFEST else f"{file} is not what was written"
    assert note == f"{tmp_path}/step_000002 is damaged ({what}); the one before is taken"
    load_checkpoint(found.path, WholeWeights(tiny_policy(), make_optimizer(tiny_policy())))


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_missing_file_does_too(file: str, tmp_path: Path) -> None:
    trained(tmp_path, 2)
    (tmp_path / "step_000002" / file).unlink()
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    file = tmp_path / "step_000002" / TRAINER
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, len(found.damaged)) == (1, 1)


def test_all_damaged_is_an_error_that_removes_nothing(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    for step in (1, 2):
        tear(tmp_path / f"step_00000{step}" / TRAINER)
    with pytest.raises(CheckpointError, match=r"step_000002 is damaged .*, and there is no other; remove it"):
        find_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_damaged_checkpoint_makes_room_for_the_whole_one_to_come(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    tear(tmp_path / "step_000003" / TRAINER)
    (tmp_path / ".step_000004.123.partial").mkdir()
    forget_checkpoints_after(tmp_path, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("size", [100, 1500, 30_000, 200_000], ids=["config", "tokenizer", "weights", "moments"])
def test_a_disk_that_refuses_is_an_oserror_and_the_last_checkpoint_stays(size: int, tmp_path: Path) -> None:
    policy, optimizer = trained(tmp_path, 1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "step_000001").iterdir()}
    assert sizes[STATE] < 100 < sizes["config.json"] < 1500 < sizes["tokenizer.json"]
    assert sizes["tokenizer.json"] < 30_000 < sizes["model.safetensors"] < 200_000 < sizes[TRAINER]
    with files_at_most(size), pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, 2, policy, make_tokenizer(), optimizer.state_tensors(), keep=1)
    assert names(tmp_path) == ["step_000001"]
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.damaged) == (1, ())
    save_checkpoint(tmp_path, 2, policy, make_tokenizer(), optimizer.state_tensors(), keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_a_tokenizer_that_does_not_fit_is_an_oserror_too(tmp_path: Path) -> None:
    """The tokenizers library raises a bare Exception there."""
    policy = tiny_policy()
    with files_at_most(300_000), pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, 1, policy, make_tokenizer(20_000), make_optimizer(policy).state_tensors(), keep=1)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    policy = tiny_policy()
    with pytest.raises(OSError, match="checkpoints"):
        save_checkpoint(
            tmp_path / "checkpoints", 1, policy, make_tokenizer(), make_optimizer(policy).state_tensors(), keep=1
        )


def test_what_a_kill_left_does_not_stop_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / f".step_000001.{os.getpid()}.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    trained(tmp_path, 1)
    assert names(tmp_path) == ["step_000001"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_intermediate_size": 24}, "moe_intermediate_size is 16 there and 24 here"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 3 there and 2 here"),
        ({"vocab_size": 70, "n_routed_experts": 8}, "vocab_size is 61 there and 70 here; n_routed_experts is 4 there"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_untouched(changes: dict, message: str, tmp_path: Path) -> None:
    trained(tmp_path, 1)
    policy = tiny_policy(**changes)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "step_000001", WholeWeights(policy, make_optimizer(policy)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def with_adapters(config: LoraConfig | None, seed: int = 0) -> tuple[Policy, MasterAdamW]:
    policy = tiny_policy()
    if config is not None:
        add_adapters(policy, config, seed)
    return policy, make_optimizer(policy)


def test_a_run_of_adapters_goes_on_from_its_checkpoint_which_holds_them_merged_and_apart(tmp_path: Path) -> None:
    config = LoraConfig(r=2)
    policy, optimizer = with_adapters(config)
    take_step(policy, optimizer, seed=1)
    path = save_checkpoint(
        tmp_path, 1, policy, make_tokenizer(), optimizer.state_tensors(), 9, lora=config, base_model="owner/base"
    )
    again, other = with_adapters(config, seed=4)
    load_checkpoint(path, WholeWeights(again, other))
    for one, two in ((policy, optimizer), (again, other)):
        take_step(one, two, seed=3)
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert {f"adapter/{ADAPTER_CONFIG}", f"adapter/{ADAPTER_WEIGHTS}"} <= json.loads(
        (path / MANIFEST).read_text()
    ).keys()
    tear(path / "adapter" / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match="adapter"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(("first", "then"), [(LoraConfig(), None), (None, LoraConfig())], ids=["without", "with"])
def test_a_run_does_not_change_to_or_from_adapters(
    first: LoraConfig | None, then: LoraConfig | None, tmp_path: Path
) -> None:
    policy, optimizer = with_adapters(first)
    take_step(policy, optimizer, seed=1)
    path = save_checkpoint(tmp_path, 1, policy, make_tokenizer(), optimizer.state_tensors(), 9, lora=first)
    with pytest.raises(CheckpointError, match=r"trained other weights.*lora"):
        load_checkpoint(path, WholeWeights(*with_adapters(then)))
