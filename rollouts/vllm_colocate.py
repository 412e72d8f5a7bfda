"""vLLM inside the trainer's process: one engine a rank, on the rank's own device.

The weights go through vLLM's own reloading, tensor by tensor under Hugging Face's names. While the policy trains, vLLM
sleeps: at level 2 it keeps neither cache nor weights, and takes the policy's again when it wakes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from policy import Policy
from policy.tokenizer import Tokenizer
from rollouts.engine import DEFAULT_CACHE_GIB, EngineConfig
from rollouts.sampler import prompt_seeds_of
from rollouts.stop_strings import StopStrings, stop_strings_of
from rollouts.types import Completion, EngineError, EngineStats, OnGroup, SamplingParams
from rollouts.vllm_cpu import after_reload, before_reload, cpu_arguments, cpu_environment, hidden_llvmlite
from rollouts.vllm_requests import check_request, completion_of, group_of, request_params
from rollouts.vllm_weights import trunk_tensors

KNOWN_VERSIONS = ("0.22.1", "0.32.0")
"""Of vLLM: those whose source this file was written against; docs/rollouts.md says which one the tests run."""


class VllmColocateEngine:
    """An `Engine` with a vLLM of its own; the only one in the process."""

    def __init__(self, policy: Policy, config: EngineConfig, tokenizer: Tokenizer | None = None) -> None:
        if find_spec("vllm") is None:
            raise EngineError(
                "engine.kind: vllm_colocate needs vLLM, which is not installed; install it with: "
                "pip install 'grpo-reasoning[vllm]'"
            )
        on_cpu = policy.device.type == "cpu"
        level = config.vllm_colocate.sleep_level
        self.policy, self.policy_version, self.tokenizer = policy, 0, tokenizer
        self._stop_strings: StopStrings | None = None
        self.sleep_level: int = (0 if on_cpu else 2) if level == "auto" else level
        """What is freed while the policy trains; see `VllmColocateConfig`."""
        if on_cpu and self.sleep_level:
            raise EngineError(f"vLLM cannot sleep on a CPU: engine.vllm_colocate.sleep_level must be 0, got {level}")
        self._asleep: set[str] = set()
        self._owns_process_group = not dist.is_initialized()
        _prepare_environment(policy, config)
        try:
            self._llm, self._params = _start(policy, config, tokenizer, can_sleep=self.sleep_level > 0)
        except ValueError as error:  # a shape, or a cache that holds no sequence of max_position_embeddings
            self._leave_groups()
            raise EngineError(f"vLLM does not start with engine.cache_gib={config.cache_gib}: {error}") from None
        self.load_weights(policy, 0)

    @property
    def stats(self) -> EngineStats:
        """Nothing: vLLM does not tell of these."""
        return EngineStats()

    def load_weights(self, policy: Policy, version: int) -> None:
        """Copy the weights into vLLM's and forget the prefixes cached under the old ones."""
        self.policy, self.policy_version = policy, version
        self._wake("weights")
        on_cpu = policy.device.type == "cpu"
        with torch.no_grad():
            if on_cpu:
                self._llm.apply_model(before_reload)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": trunk_tensors(policy)})
            if on_cpu:
                self._llm.apply_model(after_reload)
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """See `Engine.reset_prefix_cache`."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache; was `generate` interrupted? Make another engine")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: Sequence[int] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Raises SamplingError for an empty or too long prompt."""
        check_request(prompts, params, self.policy.config.max_position_embeddings)
        if not prompts or not num_generations:
            return [[] for _ in prompts]
        self._stop_strings = stop_strings_of(params, self.tokenizer, self._stop_strings)
        seeds = prompt_seeds_of(params, len(prompts)) if prompt_seeds is None else prompt_seeds
        wanted = [self._params(**request_params(params, num_generations, seed)) for seed in seeds]
        if "weights" in self._asleep and self.sleep_level == 2:
            self.load_weights(self.policy, self.policy_version)
        self._wake("weights", "kv_cache")
        groups: list[list[Completion]] = [[] for _ in prompts]
        with closing(self._answers(prompts, wanted)) as answers:
            for place, answer in answers:
                completions = [
                    completion_of(
                        output.token_ids,
                        [
                            of_token[token].logprob
                            for token, of_token in zip(output.token_ids, output.logprobs, strict=True)
                        ],
                        output.finish_reason,
                        params=params,
                        version=self.policy_version,
                        stop_strings=self._stop_strings,
                    )
                    for output in sorted(answer.outputs, key=lambda output: output.index)
                ]
                groups[place] = group_of(completions, num_generations)
                if on_group is not None:
                    on_group(place, groups[place])
        self._sleep()
        return groups

    def _answers(self, prompts: Sequence[Sequence[int]], wanted: Sequence[Any]) -> Generator[tuple[int, Any]]:
        """Places of the prompts in the order in which vLLM is done with them, with its outputs.

        `LLM.generate` has the same loop, but gives nothing before the end. Left early, it drops what is not done.
        """
        from vllm.sampling_params import RequestOutputKind

        engine, unfinished = self._llm.llm_engine, dict[str, int]()
        try:
            for place, (prompt, params) in enumerate(zip(prompts, wanted, strict=True)):
                params.output_kind = RequestOutputKind.FINAL_ONLY
                unfinished[str(place)] = place
                engine.add_request(str(place), {"type": "token", "prompt_token_ids": list(prompt)}, params)
            while unfinished:
                for output in engine.step():
                    if output.finished:
                        yield unfinished.pop(output.request_id), output
        finally:
            if unfinished:
                engine.abort_request(list(unfinished))

    def close(self) -> None:
        """Stop vLLM and give its memory back."""
        self._sleep()  # torch keeps what vLLM lets go of, but what sleeps lies nowhere
        core = self._llm.llm_engine.engine_core
        if self._owns_process_group:
            core.shutdown()
        else:  # which would end the trainer's groups with vLLM's own
            core.engine_core.model_executor.shutdown()
            gc.unfreeze()
        del self._llm, core
        self._leave_groups()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _leave_groups(self) -> None:
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        if self._owns_process_group:
            destroy_distributed_environment()

    def _sleep(self) -> None:
        if self.sleep_level and not self._asleep:
            self._llm.sleep(level=self.sleep_level)
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, *parts: str) -> None:
        for part in parts:
            if part in self._asleep:
                torch.cuda.empty_cache()  # what the trainer's allocator holds in reserve is not free to vLLM
                self._llm.wake_up(tags=[part])
                self._asleep.discard(part)


def _prepare_environment(policy: Policy, config: EngineConfig) -> None:
    """What vLLM reads from the environment alone, where the person has not said otherwise.

    A size of the cache that stands there would go before the recipe's, without a word.
    """
    if config.cache_gib is not None:
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the weights are
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if policy.device.type == "cpu":
        wanted |= cpu_environment(policy.config)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise EngineError("engine.kind: vllm_colocate runs vLLM in this process; unset VLLM_ENABLE_V1_MULTIPROCESSING")


def _cache_bytes(policy: Policy, config: EngineConfig) -> int | None:
    """Of vLLM's cache; None leaves it what `gpu_memory_utilization` says."""
    if config.cache_gib is None and policy.device.type != "cpu":
        return None
    return int((config.cache_gib or DEFAULT_CACHE_GIB) * 2**30)


def _start(
    policy: Policy, config: EngineConfig, tokenizer: Tokenizer | None, *, can_sleep: bool
) -> tuple[Any, type[Any]]:
    """vLLM's engine with the policy's shape and no weights yet, and its class of sampling parameters."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {
        "load_format": "dummy",  # the weights come from the policy
        "skip_tokenizer_init": tokenizer is None,  # tokens in, tokens out; it finds stop strings alone
        "dtype": str(policy.dtype).removeprefix("torch."),
        "max_model_len": policy.config.max_position_embeddings,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_num_seqs),
        "kv_cache_memory_bytes": _cache_bytes(policy, config),
        "gpu_memory_utilization": config.vllm_colocate.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "enable_sleep_mode": can_sleep,
        "enforce_eager": config.vllm_colocate.enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        **(cpu_arguments() if policy.device.type == "cpu" else {}),
    }
    if dist.is_initialized() and dist.get_world_size() > 1:
        arguments["distributed_executor_backend"] = "external_launcher"  # ranks are the launcher's
    if missing := sorted(arguments.keys() - {field.name for field in fields(EngineArgs)}):
        raise EngineError(
            f"vllm {vllm.__version__} has no {', '.join(missing)}; those that have: {', '.join(KNOWN_VERSIONS)}"
        )
    folder = model_folder(policy.config.to_hf() | {"dtype": arguments["dtype"]}, tokenizer)
    with hidden_llvmlite():
        return vllm.LLM(model=str(folder), **arguments), vllm.SamplingParams


def model_folder(values: dict[str, Any], tokenizer: Tokenizer | None) -> Path:
    """A folder in vLLM's cache with `config.json` of these values and the tokenizer, the same for the same contents.

    vLLM finds what it once compiled by the name of the model's folder, among other things.
    """
    from vllm import envs

    root = Path(envs.VLLM_CACHE_ROOT) / "grpo_models"
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root) as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        (fresh / "config.json").write_text(json.dumps(values))
        if tokenizer is not None:
            tokenizer.save(fresh)
        digest = hashlib.sha256()
        for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
            digest.update(file.name.encode() + file.read_bytes())
        folder = root / digest.hexdigest()[:16]
        try:
            fresh.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else it is there already
                raise
    return folder
