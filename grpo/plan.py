"""What a recipe will need of a device's memory, worked out before anything is loaded.

Two moments of a step matter. Sampling holds the weights, the optimizer's state, the cache and a pass over prompts; the
update holds the same (the built-in engine keeps its cache), gradients in fp32, and one micro-batch's forward and
backward pass (policy/footprint.py). What weights in pieces take is in grpo/shares.py. All completions are taken to be
as long as `max_completion_length` allows.

What torch allocates is worked out; a GPU holds more: its context, and what lies unused between allocations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from grpo.batch import LEAST_SAVED, LEAST_SAVED_ON_CPU, Row, count_sharing, cut_by_prompts
from grpo.config import Config, ConfigError
from grpo.optimizer_8bit import CHUNK, WORK_BYTES
from grpo.optimizer_offload import STAGING_BYTES
from grpo.scoring import drawn_with
from grpo.shares import ALONE, Share, Spread, share_of
from grpo.support import is_truncated
from grpo.types import Origin
from policy import PolicyConfig
from policy.footprint import PassPeak, PassSize, inference_bytes, peak_of_pass
from policy.linear import has_tiles
from policy.parameter_count import ParameterCount, count_parameters
from rollouts import Completion
from rollouts.builtin_engine import FREE_SHARE
from rollouts.engine import DEFAULT_CACHE_GIB
from rollouts.graphs import CAPTURED_ROWS

GIB = 2**30
CONTEXT_BYTES = int(0.85 * GIB)
"""Of a GPU, what its driver and libraries hold (0.82 GiB on an H100); of a CPU, about what Python and torch do."""
UNUSED_SHARE = 0.1
"""Of what is allocated, what lies unused beside it and cannot be given back. With room to spare torch lets it grow to
more (12% to 37% on an H100).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What a rank computes on."""

    name: str
    memory: int
    """Bytes."""
    is_gpu: bool

    @classmethod
    def detect(cls, *, is_gpu: bool, memory_gib: float | None = None, name: str | None = None) -> Device:
        """This machine's, as far as it is not said. Raises ConfigError for a GPU of unknown size where none is here."""
        if is_gpu and not torch.cuda.is_available():
            if memory_gib is None:
                raise ConfigError("no GPU here to look at; say how much memory it has: --memory-gib 80")
            return cls(name=name or "a GPU", memory=int(memory_gib * GIB), is_gpu=True)
        if is_gpu:
            found = torch.cuda.get_device_properties(0)
            memory = int(found.total_memory) if memory_gib is None else int(memory_gib * GIB)
            return cls(name=name or found.name, memory=memory, is_gpu=True)
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = total if memory_gib is None else int(memory_gib * GIB)
        return cls(name=name or "main memory", memory=memory, is_gpu=False)

    def footprint(self, allocated: int) -> int:
        """Bytes taken of it where torch has allocated so many."""
        return int(allocated * (1 + UNUSED_SHARE)) + CONTEXT_BYTES

    def fits(self, allocated: int) -> bool:
        """Whether it holds that much."""
        return self.footprint(allocated) <= self.memory


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatches:
    """How a rank's completions of one optimizer step are cut."""

    count: int
    rows: int
    """Of the largest."""
    row_tokens: int
    """Prompt and completion."""

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch."""
        return self.rows * self.row_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """What is saved where a group's prompt is gone over once (`share_prompts`), on one rank."""

    tokens: int
    """Of all passes of an optimizer step."""
    alone: int
    """The same, each row by itself."""
    count: int
    """Micro-batches."""
    activations: int
    """Bytes kept of the largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one rank of a recipe needs, in bytes where nothing else is said."""

    config: Config
    """The recipe."""
    parameters: ParameterCount
    spread: Spread
    """How the policy lies over ranks."""
    share: Share
    """What this rank holds of it."""
    micro_batches: MicroBatches
    sharing: Sharing | None
    """Where prompts are shared. The rest is planned without: the tokens of a micro-batch bound both."""
    cache: int
    """Of the sampler, kept during the update too."""
    graphs: int
    """What captured decoding steps hold: logits, hidden states."""
    prefill: int
    """A pass over prompts, or what vLLM holds while it samples and lets go of."""
    pass_peak: PassPeak
    """The worst moment of a micro-batch's forward and backward pass."""
    optimizer_work: int
    """What a step of the optimizer makes beside all this."""

    @property
    def resident(self) -> int:
        """Held all the time."""
        share = self.share
        held = share.weights + share.masters + share.moments + share.reference + share.sampler
        return held + self.cache + self.graphs

    @property
    def sampling_peak(self) -> int:
        """The most that is allocated while completions are sampled."""
        return self.resident + self.prefill

    @property
    def update_peak(self) -> int:
        """The most that is allocated while the policy is updated."""
        is_fp32, gradients = self.config.dtype == "float32", self.share.gradients
        if self.spread.way != "whole":
            # Gradients leave for their pieces block by block, those of the pass among the buffers.
            working = gradients + self.share.gathered + self.share.buffers + self.pass_peak.total
        elif self.micro_batches.count > 1:
            # In fp32, gradients add up in place, and only one of them is there twice at a time.
            fresh = 4 * self.parameters.embedding if is_fp32 else self.pass_peak.gradients
            working = gradients + self.pass_peak.total - self.pass_peak.gradients + fresh
        else:
            # Masters' gradients come as the policy's go.
            working = max(self.pass_peak.total, gradients + 2 * self.parameters.embedding)
        return self.resident + max(working, gradients + self.optimizer_work)

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self.sampling_peak, self.update_peak)


def estimate(
    config: Config,
    shape: PolicyConfig,
    device: Device,
    *,
    prompt_tokens: int,
    spread: Spread = ALONE,
) -> Estimate:
    """What the first rank of those that the policy is spread over needs; no other needs more.

    `prompt_tokens` is the length of a prompt. Raises LoraError where the recipe adapts a layer that is not there, and
    ConfigError for keys that do not go with weights in pieces.
    """
    parameters, num_processes = count_parameters(shape, config.lora), spread.num_processes
    share = share_of(config, shape, spread, is_gpu=device.is_gpu)
    held = share.weights + share.masters + share.moments + share.reference + share.sampler
    cache = _cache_bytes(config, shape, device, held, prompt_tokens, num_processes)
    batches = micro_batches(config, prompt_tokens, num_processes)
    work = WORK_BYTES * min(CHUNK, parameters.largest) // CHUNK
    is_offloaded = config.offload_optimizer and device.is_gpu
    # Of weights in pieces, gradients of the pass are gone by the next block.
    in_pass = (
        parameters if spread.way == "whole" else replace(parameters, layers=(0,) * len(parameters.layers), embedding=0)
    )
    return Estimate(
        config=config,
        parameters=parameters,
        spread=spread,
        share=share,
        micro_batches=batches,
        sharing=share_prompts(config, shape, device, prompt_tokens, num_processes),
        cache=cache,
        graphs=_graph_bytes(config, shape, device, num_processes),
        prefill=_prefill_bytes(config, shape, device, prompt_tokens, num_processes),
        pass_peak=peak_of_pass(shape, _pass_size(config, shape, device, batches), in_pass),
        optimizer_work=STAGING_BYTES if is_offloaded else work if config.optimizer == "adamw_8bit" else 0,
    )


def micro_batches(config: Config, prompt_tokens: int, num_processes: int = 1) -> MicroBatches:
    """As `grpo.batch.make_batches` cuts completions of full length, and prompts of this one, each row by itself."""
    row_tokens = prompt_tokens + config.max_completion_length
    rows = _num_rows(config, num_processes) // config.num_minibatches or 1
    at_once = min(rows, max(1, config.max_tokens_per_micro_batch // row_tokens))
    return MicroBatches(count=-(-rows // at_once), rows=at_once, row_tokens=row_tokens)


def share_prompts(
    config: Config, shape: PolicyConfig, device: Device, prompt_tokens: int, num_processes: int = 1
) -> Sharing | None:
    """As `grpo.batch.make_batches` cuts groups of full completions; None where it goes over each row by itself."""
    least = LEAST_SAVED if device.is_gpu else LEAST_SAVED_ON_CPU
    completion = Completion(
        token_ids=[0] * config.max_completion_length, logprobs=[], finish_reason="length", policy_version=0
    )
    prompt = [0] * prompt_tokens
    rows = [
        Row(
            prompt_ids=prompt,
            completion=completion,
            advantage=0.0,
            learned=True,
            origin=Origin(problem=p, completion=g),
        )
        for p in range(-(-config.prompts_per_step // num_processes) // config.num_minibatches or 1)
        for g in range(config.num_generations)
    ]
    parts = cut_by_prompts(rows, config.max_tokens_per_micro_batch)
    tokens, alone = [count_sharing(part) for part in parts], sum(map(len, rows))
    if not config.share_prompts or sum(tokens) > (1 - least) * alone:
        return None
    largest = MicroBatches(count=1, rows=1, row_tokens=max(tokens))
    size = replace(_pass_size(config, shape, device, largest), longest=len(rows[0]))
    kept = peak_of_pass(shape, size, count_parameters(shape, config.lora)).activations
    return Sharing(tokens=sum(tokens), alone=alone, count=len(parts), activations=kept)


def _num_rows(config: Config, num_processes: int) -> int:
    """Completions of one rank's share of a step."""
    return -(-config.prompts_per_step // num_processes) * config.num_generations


def _pass_size(config: Config, shape: PolicyConfig, device: Device, batches: MicroBatches) -> PassSize:
    return PassSize(
        num_tokens=batches.tokens,
        longest=batches.row_tokens,
        itemsize=4 if config.dtype == "float32" else 2,
        residual_in_fp32=config.residual_in_fp32,
        is_gpu=device.is_gpu,
        has_tiles=not device.is_gpu and has_tiles(config.num_threads),
        recomputation=config.activation_recomputation,
        lora=config.lora,
        num_ahead=shape.num_nextn_predict_layers if config.mtp_weight else 0,
        is_truncated=is_truncated(drawn_with(config)),
    )


def _calls(config: Config, num_processes: int) -> Iterator[tuple[int, int]]:
    """Prompts and completions of each that the engine is asked for at once: by a step, and by an evaluation."""
    yield -(-config.prompts_per_step // num_processes), config.num_generations
    asked = min(config.evaluation.batch_size, -(-config.evaluation.num_problems // num_processes))
    if asked:
        yield asked, config.evaluation.k


def _cache_bytes(
    config: Config, shape: PolicyConfig, device: Device, held: int, prompt_tokens: int, num_processes: int
) -> int:
    """As `BuiltinEngine` makes it; vLLM's share of the device where it is the engine and does not let go of it."""
    engine = config.engine
    if engine.kind != "builtin":
        keeps = engine.kind == "vllm_colocate" and device.is_gpu and engine.vllm_colocate.sleep_level == 0
        return int(engine.vllm_colocate.gpu_memory_utilization * device.memory) if keeps else 0
    num_drafts = engine.speculative.num_speculative_tokens
    layers = shape.num_cache_layers if num_drafts else shape.num_hidden_layers
    block_bytes = layers * engine.block_size * shape.cache_width * (4 if config.dtype == "float32" else 2)
    per_sequence = -(-(prompt_tokens + config.max_completion_length) // engine.block_size) + 1
    blocks = 0
    for prompts, group in _calls(config, num_processes):
        rows = min(engine.max_num_seqs, prompts * group)
        blocks = max(blocks, (rows + prompts) * per_sequence)
    if not device.is_gpu:
        return min(blocks * block_bytes, int((engine.cache_gib or DEFAULT_CACHE_GIB) * GIB))
    free = max(0, device.memory - CONTEXT_BYTES - held)
    allowed = FREE_SHARE * free if engine.cache_gib is None else engine.cache_gib * GIB
    return int(min(blocks * 5 // 4 * block_bytes, allowed))


def _decoded_rows(config: Config, num_processes: int) -> int:
    return min(config.engine.max_num_seqs, max(prompts * group for prompts, group in _calls(config, num_processes)))


def _graph_bytes(config: Config, shape: PolicyConfig, device: Device, num_processes: int) -> int:
    """Logits and hidden states of every batch size that may be captured while sequences come to their ends."""
    if not device.is_gpu or config.engine.kind != "builtin":
        return 0
    most = _decoded_rows(config, num_processes)
    rows = sum(size for size in CAPTURED_ROWS if size < most) + most
    return rows * (4 * shape.vocab_size + 2 * shape.hidden_size)


def _prefill_bytes(config: Config, shape: PolicyConfig, device: Device, prompt_tokens: int, num_processes: int) -> int:
    """The most of a pass over prompts, with the logits after each; or of a decoding step with its logits."""
    engine = config.engine
    if engine.kind != "builtin":
        sleeps = engine.kind == "vllm_colocate" and device.is_gpu and engine.vllm_colocate.sleep_level != 0
        return int(engine.vllm_colocate.gpu_memory_utilization * device.memory) if sleeps else 0
    prompts = max(count for count, _ in _calls(config, num_processes))
    at_once = max(1, min(prompts, engine.max_num_batched_tokens // prompt_tokens))
    size = PassSize(
        num_tokens=at_once * prompt_tokens,
        longest=prompt_tokens,
        itemsize=4 if config.dtype == "float32" else 2,
        residual_in_fp32=config.residual_in_fp32,
        is_gpu=device.is_gpu,
    )
    read = inference_bytes(shape, size) + 4 * shape.vocab_size * at_once
    # A CPU's sampler makes log-probabilities in fp32 and their running sum in fp64.
    drawn = _decoded_rows(config, num_processes) * shape.vocab_size * (4 if device.is_gpu else 24)
    return max(read, drawn)
