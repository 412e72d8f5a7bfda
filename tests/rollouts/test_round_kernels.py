"""A round of speculation on a pretended GPU, with its kernels, against the same round on the CPU.

Shapes: A sequences, C model width, M blocks of the longest sequence.
"""

import pytest
import torch
from torch import Tensor

from policy import Policy
from rollouts import SamplingParams
from rollouts.model_runner import ModelRunner
from rollouts.speculative import Speculator, _State
from tests.policies import tiny_policy
from tests.pretended_gpu import pretended_gpu
from tests.rollouts.test_speculative import quieten

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended")


class Round:
    """Sequences of 1, 7 and 12 tokens over whatever the cache and the windows hold, and an idle row."""

    def __init__(self, policy: Policy, num_drafts: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.runner = ModelRunner(policy, 20, 4, 6, policy.config.num_cache_layers)
        self.runner.cache.normal_(generator=generator)
        self.speculator = Speculator(self.runner, num_drafts, 100, 3, 8192)
        self.speculator._hidden.normal_(generator=generator)
        self.speculator._tokens.random_(3, 60, generator=generator)
        self.numbers_5A = torch.tensor([[2, 0, 1, 3], [9, 8, 7, 0], [5, 6, 7, 0], [1, 7, 12, 0], [1, 3, 4, 0]])
        self.state = _State.of(self.numbers_5A)
        self.table_AM = torch.tensor([list(range(6)), list(range(6, 12)), list(range(12, 18)), [20] * 6])

    def run(self, params: SamplingParams) -> Tensor:
        with torch.no_grad():
            return self.speculator._round(self.state, self.table_AM, params)

    def kept(self) -> list[Tensor]:
        """What a round leaves: of the three sequences alone, where rows are told apart."""
        runner, speculator = self.runner, self.speculator
        return [speculator._hidden[:3], speculator._tokens[:3], self.numbers_5A[:, :3], runner.cache[:, :18]]


def drafting(num_modules: int) -> Policy:
    """One dense layer, and modules of one."""
    return quieten(
        tiny_policy(num_hidden_layers=1, first_k_dense_replace=9, num_nextn_predict_layers=num_modules), 0.05
    )


PARAMS = SamplingParams(max_completion_length=1, temperature=0.05)


def test_a_round_is_that_of_a_cpu() -> None:
    num_drafts, policy = 3, drafting(2)
    plain, ours, steps = Round(policy, num_drafts), Round(policy, num_drafts), num_drafts + 1
    wanted = plain.run(PARAMS)
    with pretended_gpu() as kernels:
        got = ours.run(PARAMS)
    assert kernels.total() <= 96  # of trunk and three drafts, one layer each
    is_said = [*range(steps), 2 * steps]
    assert torch.equal(got[is_said, :3], wanted[is_said, :3])
    logprobs, expected = (report[steps : 2 * steps, :3].contiguous().view(torch.float32) for report in (got, wanted))
    assert torch.allclose(logprobs, expected, atol=1e-4)
    for mine, other in zip(ours.kept(), plain.kept(), strict=True):
        assert torch.allclose(mine.float(), other.float(), atol=1e-4)
    accepted = wanted[-1, :3].tolist()
    assert max(accepted) > 0
    assert min(accepted) < num_drafts


def test_a_sequence_of_nan_says_so() -> None:
    policy = drafting(1)
    policy.embed_tokens.weight.data[6] = float("nan")  # the second sequence's last token
    ours = Round(policy, 1)
    with pretended_gpu(may_wait=True):
        report_XA = ours.run(PARAMS)
    assert report_XA[0].lt(0).tolist() == [False, True, False, False]
    assert report_XA[-1, 1] == 0
    assert ours.numbers_5A[2:, 1].tolist() == [0, 8, 4]
