"""The CPU's kernels against their formulas in fp64, values and gradients; and numbers that are none."""

import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policy import cpu_compiler, cpu_kernels, fused
from policy.grouped import gather_sorted, mix_sorted
from policy.norm import RMSNorm


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, exact: Tensor) -> bool:
    return ours.shape == exact.shape and torch.allclose(ours.double(), exact.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rows", [0, 1, cpu_kernels.ROWS_AT_ONCE + 3])
@pytest.mark.parametrize("width", [1, 37])
def test_rows_of_a_wider_tensor_are_normalised_and_so_are_their_gradients(rows: int, width: int) -> None:
    norm = RMSNorm(width, eps=1e-5)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    wide, back = 3 * draw(rows, width + 5), draw(rows, width, seed=1)
    ours, exact = wide.clone().requires_grad_(), wide.double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    x = exact[:, 3 : 3 + width]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    got = norm(ours[:, 3 : 3 + width])
    got.backward(back)
    expected.backward(back.double())
    assert close(got, expected)
    assert close(ours.grad, exact.grad)
    assert torch.allclose(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("are_halves", [True, False])
def test_silu_gate_equals_its_definition_gradients_too(rows: int, are_halves: bool) -> None:
    both, back = 4 * draw(rows, 2 * 37), draw(rows, 37, seed=1)
    ours, exact = both.clone().requires_grad_(), both.double().requires_grad_()
    got = fused.silu_gate_halves(ours) if are_halves else fused.silu_gate(ours[:, :37], ours[:, 37:])
    expected = F.silu(exact[:, :37]) * exact[:, 37:]
    got.backward(back)
    expected.backward(back.double())
    assert close(got, expected)
    assert close(ours.grad, exact.grad)
    with torch.no_grad():
        assert torch.equal(fused.silu_gate_halves(both), got)


@pytest.mark.parametrize("is_interleaved", [True, False])
def test_pairs_turn_as_in_fp64_gradients_too(is_interleaved: bool) -> None:
    wide, angles = draw(7, 3, 26), 9 * draw(7, 6, seed=1)
    ours, exact = wide.clone().requires_grad_(), wide.double().requires_grad_()
    cos, sin = angles.cos(), angles.sin()
    got = fused.turn_pairs(ours[..., 5:22], cos, sin, is_interleaved=is_interleaved)
    expected = fused.turn_pairs(exact[..., 5:22], cos.double(), sin.double(), is_interleaved=is_interleaved)
    back = draw(7, 3, 17, seed=2)
    got.backward(back)
    expected.backward(back.double())
    assert close(got, expected)
    assert close(ours.grad, exact.grad)


def test_keys_and_values_equal_their_definition_gradients_too() -> None:
    inputs = draw(7, 3, 20), draw(7, 11, seed=1)
    ours, exact = ([x.to(dtype).clone().requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    got = fused.split_keys_values(ours[0], ours[1][:, 3:], 12)
    expected = fused.split_keys_values(exact[0], exact[1][:, 3:], 12)
    # A head's gradients come from a padded layout: neither rows nor heads lie end to end.
    backs = [draw(3, 7, x.shape[-1], seed=2).transpose(0, 1) for x in got]
    torch.autograd.backward(got, backs)
    torch.autograd.backward(expected, [back.double() for back in backs])
    assert all(close(a, b) for a, b in zip(got, expected, strict=True))
    assert all(close(a.grad, b.grad) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_experts_outputs_are_mixed_and_gathered_as_in_fp64_gradients_too(per_token: int) -> None:
    order = torch.randperm(9 * per_token, generator=torch.Generator().manual_seed(3))
    inputs = draw(9, 13), draw(9, per_token, seed=1)
    ours, exact = ([x.to(dtype).clone().requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    back = draw(9, 13, seed=2)
    results = []
    for x_NC, weights_NK in (ours, exact):
        rows_TC = gather_sorted(x_NC, order, per_token)
        mixed = mix_sorted(rows_TC * rows_TC, order, weights_NK)
        mixed.backward(back.to(mixed.dtype))
        results.append(mixed.detach())
    assert close(*results)
    assert all(close(a.grad, b.grad) for a, b in zip(ours, exact, strict=True))


def test_the_exponential_is_within_two_units_of_the_last_place() -> None:
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    ours = np.array([cpu_compiler.exp(number) for number in x])
    assert np.abs(ours / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7


def test_what_is_not_a_number_is_seen_by_the_kernels() -> None:
    nan, inf = math.nan, math.inf
    gate = torch.tensor([[nan, inf, -inf, 1000.0, -1000.0, 1.0]])
    silent = fused.silu_gate(gate, torch.ones(1, 6))
    assert torch.equal(silent.isnan(), torch.tensor([[True, False, True, False, False, False]]))
    assert silent[0, 1] == inf
    assert silent[0, 3] == 1000
    assert silent[0, 4] == 0
    norm = RMSNorm(4, eps=1e-6)
    for number in (nan, inf):
        x = torch.ones(3, 4)
        x[1, 2] = number
        x.requires_grad_()
        out = norm(x)
        out.sum().backward()
        assert out.isfinite().all(1).tolist() == [True, False, True]
        assert not x.grad[1].isfinite().all()
        assert not norm.weight.grad.isfinite().all()
        norm.weight.grad = None


def test_what_was_compiled_is_kept_by_the_contents_of_all_kernels_or_not_at_all(tmp_path: Path) -> None:
    package, home = tmp_path / "policy", tmp_path / "home"
    package.mkdir()
    for file in (cpu_compiler.__file__, cpu_kernels.__file__):
        shutil.copy(file, package)
    (package / "__pycache__").touch()  # a file, so that nobody, root included, can make the folder
    program = (
        "import torch; from policy import cpu_kernels; x = torch.ones(2, 4);"
        "print(cpu_kernels.silu_gate_forward(x, x).sum().item())"
    )

    def run() -> None:
        environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONPATH": "."}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(8 / (1 + math.exp(-1)))

    run()
    [kept] = (home / "grpo-reasoning").iterdir()
    assert list(kept.rglob("*.nbi"))
    (package / "cpu_other.py").write_text("# another kernel's file\n")
    run()
    assert len(list((home / "grpo-reasoning").iterdir())) == 2, "what other files were compiled with is not taken"
    shutil.rmtree(home)
    home.touch()
    run()


def test_compiled_kernels_that_nobody_used_for_long_are_removed_by_several_at_once(tmp_path: Path) -> None:
    now = tmp_path.stat().st_mtime
    for name, days in {"old": 31, "older": 400, "recent": 29}.items():
        for number in range(20):
            folder = tmp_path / f"kernels-{name}{number}" / "policy_1"
            folder.mkdir(parents=True)
            (folder / "kernel.nbi").write_bytes(b"compiled")
            os.utime(folder.parent, (now - days * 24 * 3600,) * 2)
    current, file, other = tmp_path / "kernels-current", tmp_path / "kernels-file", tmp_path / "another"
    current.mkdir()
    file.touch()
    other.mkdir()
    for path in (current, file, other):
        os.utime(path, (0, 0))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cpu_compiler.remove_unused, [current] * 8))
    recent = {f"kernels-recent{number}" for number in range(20)}
    assert {path.name for path in tmp_path.iterdir()} == recent | {current.name, file.name, other.name}
    assert current.stat().st_mtime >= now - 1, "a folder in use is never old"
    with pytest.raises(FileNotFoundError):
        cpu_compiler.remove_unused(tmp_path / "kernels-gone")
