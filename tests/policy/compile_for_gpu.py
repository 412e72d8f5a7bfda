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
    from policy import layer_kernels, step_kernels
    from rollouts import round_kernels
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
        x_NC, experts_NK = torch.zeros(2, 768), torch.zeros(2, 6, dtype=torch.int64)
        inner_NC, weights_NK = torch.zeros(2, 768, dtype=dtype), torch.zeros(2, 6)
        layer_kernels.add_normalise(x_NC, inner_NC, torch.zeros(768, dtype=dtype), 1e-6)
        layer_kernels.join_normed(inner_NC, inner_NC, inner_NC[0], inner_NC[0], 1e-6)
        layer_kernels.enter_latent(
            torch.zeros(2, 2304, dtype=dtype), torch.zeros(2, 576, dtype=dtype), torch.zeros(512, dtype=dtype), 1e-6,
            torch.zeros(2, 32), torch.zeros(2, 32), slots, blocks, 12, is_interleaved=True,
        )  # fmt: skip
        gate_up, down = torch.zeros(8, 512, 768, dtype=dtype), torch.zeros(8, 768, 256, dtype=dtype)
        for shared in (None, (gate_up[0], gate_up[0], torch.zeros(768, 512, dtype=dtype))):
            layer_kernels.mix_experts(x_NC, inner_NC, experts_NK, weights_NK, gate_up, down, shared)
            shared_NC = None if shared is None else inner_NC
            layer_kernels.gather_into(x_NC, torch.zeros(12, 768, dtype=dtype), experts_NK, weights_NK, shared_NC)
        kept, tokens, state = torch.zeros(3, 4, 768, dtype=dtype), torch.zeros(3, 4, dtype=torch.int64), slots
        hidden_WAC, known_TA = round_kernels.enter(kept, tokens, state, state, 3)
        sampled = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.bool), torch.zeros(8)
        new_hidden_RC = torch.zeros(8, 768, dtype=dtype)
        round_kernels.leave(kept, tokens, (state, state, state, state), hidden_WAC, known_TA, new_hidden_RC, sampled)
