"""Prompts read token by token, each a row of its own, against the pass over whole rows.

Shapes: P prompts.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import Policy
from rollouts.model_runner import MOST_READ, ModelRunner, PromptPass
from rollouts.sequence import Chunk, Prefill
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

SIZE = 4
"""Tokens of a block."""
BEGIN = list(range(10, 21))
PROMPTS = [[5, 9, 11, 3, 7], [*BEGIN, 3, 4, 5], [*BEGIN, 6], [40], list(range(20, 52))]
NUM_CACHED = [0, 0, 8, 0, 9]
"""Two blocks of the third are the second's, which the same pass fills; 9 tokens of the fifth are there before."""


def policy_of(family: str, num_modules: int = 0) -> Policy:
    if family == "deepseek_v3":
        return tiny_policy(num_nextn_predict_layers=num_modules)
    changes = TINY_QWEN3_MOE if family == "qwen3_moe" else dict[str, object]()
    return tiny_llama(0, **changes)


def read(policy: Policy, num_modules: int, *, by_row: bool) -> tuple[ModelRunner, PromptPass]:
    runner = ModelRunner(policy, 40, SIZE, 10, policy.config.num_cache_layers)
    runner.most_prompt_rows = 1000 if by_row else 0
    prefills = [
        Prefill(token_ids=prompt, sequences=[], blocks=np.arange(8 * place, 8 * place + 8))
        for place, prompt in enumerate(PROMPTS)
    ]
    assert prefills[1].blocks is not None
    assert prefills[2].blocks is not None
    prefills[2].blocks[:2] = prefills[1].blocks[:2]
    before = [Chunk(prefill=p, begin=0, end=count) for p, count in zip(prefills, NUM_CACHED, strict=True) if count == 9]
    after = [Chunk(prefill=p, begin=count, end=len(p.token_ids)) for p, count in zip(prefills, NUM_CACHED, strict=True)]
    with torch.inference_mode():
        for chunks in (before, after):
            assert runner.reads_rows(chunks) is by_row
            got = runner.read(chunks, num_modules)
            # What a graph gives is written anew by the next pass.
            got = replace(got, hidden_NC=got.hidden_NC.clone())
    return runner, got


CASES = [("deepseek_v3", 0), ("deepseek_v3", 2), ("llama", 0), ("qwen3_moe", 0)]


@pytest.mark.parametrize(("family", "num_modules"), CASES)
def test_a_row_for_each_token_reads_what_whole_rows_read(family: str, num_modules: int) -> None:
    """Parts of prompts, beginnings from before and from the same pass, MTP modules and experts too."""
    policy = policy_of(family, num_modules)
    (packed, wanted), (rows, got) = (read(policy, num_modules, by_row=by_row) for by_row in (False, True))
    check_alike(packed, wanted, rows, got, 1e-4)


def check_alike(packed: ModelRunner, wanted: PromptPass, rows: ModelRunner, got: PromptPass, bound: float) -> None:
    assert got.lengths == wanted.lengths == (5, 14, 4, 1, 23)
    assert got.sound_lengths() == wanted.sound_lengths() == [5, 14, 4, 1, 23]
    assert torch.allclose(got.hidden_NC, wanted.hidden_NC, atol=bound)
    with torch.inference_mode():
        assert torch.allclose(rows.logits_after(got), packed.logits_after(wanted), atol=bound)
    # All but the last block, which is nobody's.
    assert torch.allclose(rows.cache[:, :-1], packed.cache[:, :-1], atol=bound)
    assert rows.cache[:, :-1].any(dim=-1).all(dim=0).sum() == sum(map(len, PROMPTS)) - 8
    if packed.experts is not None:
        assert rows.experts is not None
        assert torch.equal(rows.experts[:, :-1].sort().values, packed.experts[:, :-1].sort().values)
        assert rows.experts.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("family", "num_modules"), CASES)
def test_a_graph_of_prompt_tokens_reads_what_whole_rows_read(family: str, num_modules: int) -> None:
    """Replayed too: the first pass of 9 tokens and the second of 47 are of two sizes, read by new runners each time."""
    policy = policy_of(family, num_modules).cuda()
    (packed, wanted), (rows, got) = (read(policy, num_modules, by_row=by_row) for by_row in (False, True))
    check_alike(packed, wanted, rows, got, 1e-3)
    chunk = Chunk(prefill=Prefill(token_ids=PROMPTS[4], sequences=[], blocks=np.arange(32, 40)), begin=9, end=32)
    with torch.inference_mode():
        [first, again] = [rows.read([chunk], num_modules).hidden_NC.clone() for _ in range(2)]  # 32 rows, 9 idle
    assert torch.equal(first, again)
    assert torch.allclose(first, got.hidden_NC[-23:], atol=1e-3)


def test_much_that_lies_before_few_tokens_is_read_once_for_all() -> None:
    runner = ModelRunner(tiny_policy(), 4, SIZE, 4)
    runner.most_prompt_rows = 100
    entry_bytes = 3 * runner.policy.config.cache_width * 4
    most = MOST_READ // entry_bytes
    prefill = Prefill(token_ids=[5] * 100, sequences=[])
    for begin, end, expected in [(0, 100, True), (0, 101, False), (most - 1, most, True), (most, most + 1, False)]:
        assert runner.reads_rows([Chunk(prefill=prefill, begin=begin, end=end)]) is expected
    long = [Chunk(prefill=prefill, begin=most // 50, end=most // 50 + 1)]
    assert runner.reads_rows(long * 49)
    assert not runner.reads_rows(long * 51)
