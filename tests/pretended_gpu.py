"""A CPU that says it is a GPU: code takes its GPU branches, kernels are counted, waiting for the device is an error.

Inside, every tensor says that it lies on `cuda:0`; Triton's kernels run under its interpreter, and the few operations
that torch has for GPUs alone are written out. Nothing here measures time: an operation counts one whatever it does, and
what torch starts for it on a real GPU may be more (a sort, a top-k, a reduction's second pass).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from policy import decode_kernels, gpu_kernels, layer_kernels, norm_kernels, step_kernels
from policy.gpu_attention import Pairing
from rollouts import round_kernels, sampling_kernels
from tests.policy.test_attention import PLAIN

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

FREE = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal",
    "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided",
    "permute", "promote_types", "scalar_tensor", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as_complex", "view_as_real",
}  # fmt: skip
"""Operations of aten that start no kernel."""

WAITS = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim", "unique_dim_consecutive",
}  # fmt: skip
"""Operations whose result, or its shape, the host has to know."""

KERNELS = (decode_kernels, gpu_kernels, layer_kernels, norm_kernels, step_kernels, round_kernels, sampling_kernels)
"""Modules of our own kernels."""

FROM_HOST = {torch.tensor, torch.from_numpy, torch.as_tensor}
"""What takes the host's numbers: to have copied them from ordinary memory, it waits for the device."""

FACTORIES = {torch.arange, torch.zeros, torch.ones, torch.empty, torch.full}
"""What makes a tensor where it is told to, which inside has to be the GPU."""


class Waited(AssertionError):
    """The host would have waited for the GPU; the message says what for."""


@contextmanager
def pretended_gpu(*, may_wait: bool = False) -> Iterator[Counter[str]]:
    """Within, the CPU is a GPU; gives its kernels by name as they come. Raises Waited unless `may_wait`."""
    kernels = Counter[str]()
    with ExitStack() as stack:
        for module in KERNELS:
            for name, kernel in vars(module).items():
                if isinstance(kernel, InterpretedFunction) and name.endswith("_kernel"):
                    stack.enter_context(_counted(kernel, name, kernels))
        stack.enter_context(_Functions(kernels, may_wait=may_wait))
        stack.enter_context(_Kernels(kernels, may_wait=may_wait))
        yield kernels
    kernels += Counter()  # without what is 0


@contextmanager
def _counted(kernel: Any, name: str, kernels: Counter[str]) -> Iterator[None]:
    def count(*args: Any, **_: Any) -> None:
        kernels[name] += 1
        # The interpreter writes back what each argument lies in.
        kernels["copy_"] -= len({arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)})

    kernel.add_pre_run_hook(count)
    try:
        yield
    finally:
        kernel.pre_run_hooks.remove(count)


class _Functions(TorchFunctionMode):
    """What Python sees of tensors."""

    def __init__(self, kernels: Counter[str], *, may_wait: bool) -> None:
        self.kernels, self.may_wait = kernels, may_wait

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return CUDA
        if func == Tensor.backward:
            _show_to(args[0].grad_fn, self)
            return torch.autograd.backward(args[0])
        if func in FROM_HOST or (func in FACTORIES and "device" not in kwargs):
            self._wait(f"{func.__name__}, of what the host has")
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            self._wait(func.__name__)
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        if func == Tensor.to:
            args = tuple("cpu" if isinstance(arg, torch.device | str) else arg for arg in args)
        if func in ON_GPU_ALONE and (func not in WITH_OUT_DTYPE or "out_dtype" in kwargs):
            with _paused():
                return ON_GPU_ALONE[func](self.kernels, *args, **kwargs)
        return func(*args, **kwargs)

    def _wait(self, what: str) -> None:
        if not self.may_wait:
            raise Waited(what)


class _Kernels(TorchDispatchMode):
    """What torch runs, backward passes included."""

    def __init__(self, kernels: Counter[str], *, may_wait: bool) -> None:
        super().__init__()
        self.kernels, self.may_wait = kernels, may_wait

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if not self.may_wait and _waits(name, args, kwargs):
            raise Waited(str(func))
        if name not in FREE:
            self.kernels[name] += 1
        return func(*args, **kwargs)


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


def _show_to(node: Node | None, mode: _Functions) -> None:
    """Let `mode` see what backward passes written in Python do; autograd leaves it behind else."""
    waiting, known = [node], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            node.register_prehook(lambda grads: mode.__enter__() and None)
            node.register_hook(lambda ins, outs: mode.__exit__(None, None, None))


@contextmanager
def _paused() -> Iterator[None]:
    """What is written out for one kernel is not seen itself."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield


class _Flash(Function):
    """FlashAttention-2 by its definition."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, pairs: Pairing, scale: float, *qkv: Tensor) -> tuple[Tensor, Tensor]:
        kernels["_flash_attention_forward"] += 1
        out, log_total = PLAIN.attend(*(x.float() for x in qkv), pairs, scale)
        out = out.to(qkv[0].dtype)
        ctx.save_for_backward(*qkv, out, log_total)
        ctx.kernels, ctx.pairs, ctx.scale = kernels, pairs, scale
        ctx.mark_non_differentiable(log_total)
        return out, log_total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with _paused():
            return None, None, None, *_flash_gradients(ctx.kernels, ctx.pairs, ctx.scale, grads[0], *ctx.saved_tensors)


def _flash_gradients(kernels: Counter[str], pairs: Pairing, scale: float, *given: Tensor) -> tuple[Tensor, ...]:
    kernels["_flash_attention_backward"] += 1
    grads = PLAIN.gradients(*(x.float() for x in given), pairs, scale)
    return tuple(grad.to(given[0].dtype) for grad in grads)


def _pairs(query_bounds: Tensor, key_bounds: Tensor, most_queries: int, most_keys: int, is_causal: bool) -> Pairing:
    return Pairing(
        query_bounds=query_bounds, key_bounds=key_bounds, most_queries=most_queries, most_keys=most_keys,
        is_causal=is_causal,
    )  # fmt: skip


def _attend(kernels: Counter[str], *args: Any, scale: float) -> Any:
    *qkv, query_bounds, key_bounds, most_queries, most_keys, _, is_causal, _ = args
    return _Flash.apply(kernels, _pairs(query_bounds, key_bounds, most_queries, most_keys, is_causal), scale, *qkv)


def _attend_backward(kernels: Counter[str], *args: Any, scale: float) -> Any:
    *given, query_bounds, key_bounds, most_queries, most_keys, _, is_causal, _, _ = args
    return _flash_gradients(
        kernels, _pairs(query_bounds, key_bounds, most_queries, most_keys, is_causal), scale, *given
    )


class _RmsNorm(Function):
    """One kernel each way on a GPU, where a CPU takes several."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kernels["_fused_rms_norm"] += 1
        ctx.kernels, ctx.eps = kernels, eps
        ctx.save_for_backward(x, weight)
        return torch.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with _paused(), torch.enable_grad():
            ctx.kernels["_fused_rms_norm_backward"] += 1
            given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = torch.rms_norm(given[0], given[1].shape, given[1], ctx.eps)
            return None, *torch.autograd.grad(out, given, grads[0]), None


def _rms_norm(kernels: Counter[str], x: Tensor, shape: Any, weight: Tensor, eps: float) -> Any:
    return _RmsNorm.apply(kernels, x, weight, eps)


def _mm(kernels: Counter[str], a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    kernels["mm"] += 1
    return a.to(out_dtype) @ b.to(out_dtype)


def _addmm(kernels: Counter[str], total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    kernels["mm"] += 1
    return torch.addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)


WITH_OUT_DTYPE = {torch.mm, torch.bmm, torch.addmm}
ON_GPU_ALONE: dict[Any, Callable[..., Any]] = {
    torch.mm: _mm, torch.bmm: _mm, torch.addmm: _addmm, F.rms_norm: _rms_norm,
    aten._flash_attention_forward: _attend, aten._flash_attention_backward: _attend_backward,
}  # fmt: skip
