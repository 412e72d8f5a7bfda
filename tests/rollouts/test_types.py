"""What an engine is asked for: wrong requests are refused by name."""

import dataclasses

import pytest

from rollouts import Completion, SamplingError, SamplingParams


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_completion_length", 0), ("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.01),
        ("min_p", -0.1), ("min_p", 1.0),
    ],
)  # fmt: skip
def test_bad_sampling_parameters_are_named_with_their_value(key: str, value: float) -> None:
    with pytest.raises(SamplingError, match=f"{key} must be .*, got {value}"):
        SamplingParams(**{"max_completion_length": 1, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_completion_length", 1), ("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("min_p", 0.99)],
)
def test_values_at_the_edge_are_taken(key: str, value: float) -> None:
    assert getattr(SamplingParams(**{"max_completion_length": 1, key: value}), key) == value


def test_by_default_the_models_own_distribution_is_sampled() -> None:
    params = SamplingParams(max_completion_length=1)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)


def test_types_are_frozen() -> None:
    completion = Completion(token_ids=[1], logprobs=[-0.5], finish_reason="stop", policy_version=3)
    for value, field in ((completion, "token_ids"), (SamplingParams(max_completion_length=1), "seed")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 0)
