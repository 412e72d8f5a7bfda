"""A Triton kernel that adds the gradients of many tensors to fp32 totals at once. Imported only where a GPU is used.

torch adds tensors of two dtypes one after another, at a third of the memory's rate: with a few hundred of them a
twentieth of an update. The plain twin is `torch._foreach_add_`; tests compare the two on the CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Numbers that a program adds."""
ALIGNMENT = 16
"""Bytes: tensors whose memory starts at a multiple of this are read as many at once."""
KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Dtypes of gradients that are added here."""


@triton.jit
def _add_kernel(
    addresses, counts, firsts, owners, num_tensors,
    IS_FIRST: tl.constexpr, KIND: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one tensor: `owners` says of which, `firsts` which program has its first."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    given = tl.load(addresses + owner)
    if given != 0:
        total = tl.load(addresses + num_tensors + owner)
        source = tl.multiple_of(given, ALIGNMENT).to(tl.pointer_type(KIND))
        target = tl.multiple_of(total, ALIGNMENT).to(tl.pointer_type(tl.float32))
        place = (program - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < tl.load(counts + owner)
        value = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        if not IS_FIRST:
            value += tl.load(target + place, mask=inside, other=0.0)
        tl.store(target + place, value, mask=inside)


class GradientSum:
    """Adds half-precision gradients of one dtype to totals in fp32, in one kernel."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """`sizes`: the numbers of each of the tensors, of which a call may leave some out."""
        blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
        self._num_tensors, self._num_blocks, self._dtype, self._device = len(sizes), int(blocks.sum()), dtype, device
        self._counts = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._firsts = (blocks.cumsum(0) - blocks).to(device)
        self._owners = torch.arange(len(sizes)).repeat_interleave(blocks).to(device)

    def takes(self, total: Tensor, given: Tensor) -> bool:
        """Whether this pair's memory is packed and aligned, and of the dtypes."""
        tensors = (total, given)
        return (
            (total.dtype, given.dtype) == (torch.float32, self._dtype)
            and all(x.is_contiguous() for x in tensors)
            and not any(x.data_ptr() % ALIGNMENT for x in tensors)
        )

    def add(self, pairs: Mapping[int, tuple[Tensor, Tensor]], *, is_first: bool) -> None:
        """total += given for each (total, given), by the tensor's number; where `is_first`, total = given."""
        addresses = [[0] * self._num_tensors, [0] * self._num_tensors]
        for index, pair in pairs.items():
            for row, tensor in zip(addresses, (pair[1], pair[0]), strict=True):
                row[index] = tensor.data_ptr()
        # From pinned memory, so that the host need not wait for the copy.
        table = torch.tensor(list(itertools.chain(*addresses)), pin_memory=self._device.type == "cuda")
        _add_kernel[(self._num_blocks,)](
            table.to(self._device, non_blocking=True), self._counts, self._firsts, self._owners, self._num_tensors,
            IS_FIRST=is_first, KIND=KINDS[self._dtype], ALIGNMENT=ALIGNMENT, BLOCK=BLOCK,
        )  # fmt: skip
