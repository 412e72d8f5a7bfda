"""Seconds of phases, and the rates made of them."""

import time

import pytest
import torch

from grpo.throughput import ASKING, Phases, Spent, Throughput, measure_matmul_rate
from policy.flops import Flops
from tests.policies import tiny_llama

CPU = torch.device("cpu")


def test_phases_of_one_name_add_up_and_start_anew() -> None:
    phases = Phases(CPU)
    for _ in range(2):
        with phases.phase("a"):
            time.sleep(0.01)
    with phases.phase("b"):
        pass
    taken = phases.take()
    assert taken["a"] >= 0.02
    assert taken["b"] < taken["a"]
    assert phases.take() == {}
    assert phases.take_peaks() == {}


def test_rates_by_hand() -> None:
    flops = Flops.of(tiny_llama().config)
    throughput = Throughput(flops=flops, matmul_rate=1e9)
    phases = Phases(CPU)
    with phases.phase(ASKING), phases.phase("optimizer"):
        pass
    spent = Spent(seconds=2.0, lengths=[5, 3] * 2, num_tokens=48)
    metrics = throughput.metrics(spent, phases, num_sampled=30, sample_s=4.0)
    assert metrics["time/update"] == 2.0
    assert "time/optimizer" in metrics
    assert f"time/{ASKING}" not in metrics
    assert metrics["update/tokens_per_second"] == 24
    assert metrics["sample/tokens_per_second"] == 7.5
    assert metrics["update/mfu"] == pytest.approx(2 * flops.training([5, 3]) / 2e9)
    assert not any(name.startswith("memory/") for name in metrics)
    assert "sample/tokens_per_second" not in throughput.metrics(spent, phases, num_sampled=0, sample_s=0.0)


def test_the_matmul_rate_is_one_of_this_machine_and_leaves_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    rate = measure_matmul_rate(CPU, torch.float32)
    assert 1e8 < rate < 1e14
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.gpu
def test_a_gpus_phases_are_its_own_time_and_memory() -> None:
    device = torch.device("cuda")
    phases, a = Phases(device), torch.randn(4096, 4096, device=device)
    with phases.phase("warm"):
        a @ a
    with phases.phase("many"):
        for _ in range(50):
            b = a @ a
    with phases.phase("none"):
        pass
    taken, peaks = phases.take(), phases.take_peaks()
    assert taken["many"] > 10 * taken["none"]
    assert peaks["many"] >= a.nbytes + b.nbytes
    assert 1e13 < measure_matmul_rate(device, torch.bfloat16) < 1e16
