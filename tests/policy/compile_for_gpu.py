"""Compiles the kernels of a decoding step for an H100 as far as its machine code; needs Triton, not a GPU.

The interpreter that other tests run kernels in takes what the compiler refuses. Prints each kernel's name and hash.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoGpu:
    """What Triton asks of a driver before it starts a kernel, which it never does here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
    compiled = run(kernel, *args, grid=grid, warmup=True, **options)
    assert compiled.asm["cubin"]
    print(kernel.__name__, compiled.hash)


if __name__ == "__main__":
    from policy import step_kernels
    from tests.policies import tiny_llama, tiny_policy
    from tests.policy.test_step_kernels import ROUTERS

    driver.set_active(NoGpu())
    run, JITFunction.run = JITFunction.run, compile_only
    for name, shape in ROUTERS.items():
        router = (tiny_llama if name == "qwen3_moe" else tiny_policy)(**shape).moe_layers[0].gate
        logits_NE = torch.zeros(2, router.config.n_routed_experts)
        step_kernels.route(logits_NE, router.e_score_correction_bias, router.config)
    for rows in (1, 16, 256, 1001):
        step_kernels.sort_pairs(torch.zeros(rows, 6, dtype=torch.int64), 64)
    step_kernels.rotation(torch.zeros(2, dtype=torch.int64), torch.zeros(12), 1.0)
    for rows, longest in ((1, 1), (2, 3), (16, 16)):
        step_kernels.place(torch.zeros(rows, longest, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), 16)
    for dtype in (torch.float32, torch.bfloat16):
        blocks, slots = torch.zeros(3, 16, 576, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        step_kernels.write(blocks, slots, torch.zeros(2, 512, dtype=dtype), torch.zeros(2, 64, dtype=dtype))
        step_kernels.add_halves(torch.zeros(4, 6, 128), dtype)
