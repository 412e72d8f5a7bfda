"""Rows of a decoding step on several threads."""

import threading

import pytest
import torch

from rollouts import EngineConfig, SamplingParams, make_engine
from rollouts.crew import LEAST_ROWS, Crew
from tests.policies import tiny_llama, tiny_policy


def test_parts_cover_the_rows_in_order_each_on_a_thread_of_its_own() -> None:
    threads, crew, ran = torch.get_num_threads(), Crew(), {}

    def work(part: slice) -> list[int]:
        ran[part.start or 0] = threading.current_thread().name
        assert torch.is_inference_mode_enabled()
        return list(range(part.stop))[part]

    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            assert sum(crew.run(work, 2 * LEAST_ROWS + 1), []) == list(range(2 * LEAST_ROWS + 1))
            assert len(set(ran.values())) == 2
            assert len(crew.run(work, 2 * LEAST_ROWS - 1)) == 1, "too few rows to wake a second thread for"
    finally:
        torch.set_num_threads(threads)
        crew.close()


def test_completions_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for policy in (tiny_policy(), tiny_llama()):
            sampled = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                engine = make_engine(policy, EngineConfig())
                sampled.append(engine.generate([[3, 4, 5], [6, 7]], 30, SamplingParams(max_completion_length=5)))
            alone, *shared = ([each for group in groups for each in group] for groups in sampled)
            for completions in shared:
                assert [each.token_ids for each in completions] == [each.token_ids for each in alone]
                for one, other in zip(completions, alone, strict=True):
                    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    finally:
        torch.set_num_threads(threads)
