"""Compiles the CPU's kernels and keeps them; what kernels of several files call.

A kernel is Python that numba compiles at its first call and keeps on disk. Numba looks at a kernel's own file alone to
see whether what it kept is still true, and kernels call others of other files: what is kept lies in a folder named
after the contents of all.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import cfunc, njit, types
from numba.extending import intrinsic

LOG2_E, ROUNDER = np.float32(1.4426950408889634), np.float32(1.5 * 2**23)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
ZERO, ONE = np.float32(0), np.float32(1)
UNUSED_S = 30 * 24 * 3600
"""Seconds after which kernels compiled from other sources are removed where no process has asked for them."""
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract"}}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled at its first call, for vectors; what was compiled is kept where a folder can be written to.

    Sums may be taken in another order, the same for the same numbers; what is not a number stays so.
    """
    return _kept(lambda cache: njit(function, cache=cache, nogil=True, **OPTIONS))


@functools.cache
def operation(function: Callable[[Any, Any], None]) -> Any:
    """`function` of two addresses, compiled now for whoever has its `address`: see `policy/cpu_operations.py`."""
    return _kept(lambda cache: cfunc(types.void(types.int64, types.int64), cache=cache, **OPTIONS)(function))


def _kept(compiled: Callable[[bool], Any]) -> Any:
    """What `compiled` gives, told whether to keep it on disk."""
    folder, given = _folder_of_compiled(), numba.config.CACHE_DIR
    if folder is None:
        return compiled(False)
    numba.config.CACHE_DIR = str(folder)
    try:
        return compiled(True)
    finally:
        numba.config.CACHE_DIR = given


@functools.cache
def _folder_of_compiled() -> Path | None:
    """Where compiled kernels are kept: beside their sources, else in the user's cache folder; None where neither takes
    a file."""
    here, contents = Path(__file__).parent, hashlib.sha256()
    for file in sorted(here.glob("cpu_*.py")):
        contents.update(file.read_bytes())
    of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "grpo-reasoning")
    for place in (here / "__pycache__", of_user):
        folder = place / f"kernels-{contents.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            remove_unused(folder)
        except OSError:
            continue
        return folder
    return None


def remove_unused(folder: Path) -> None:
    """Mark a folder of compiled kernels as used, and remove those beside it that have not been for `UNUSED_S`.

    A process that still runs from one of these compiles anew what it has yet to load. Raises OSError where the folder
    cannot be marked; others that cannot be removed stay.
    """
    os.utime(folder)
    now = folder.stat().st_mtime  # the clock of the disk, which several machines may share
    for other in folder.parent.glob("kernels-*"):
        with suppress(OSError):  # another process may be removing it, too
            if now - other.stat().st_mtime > UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)


@intrinsic
def floats(_: Any, address: Any) -> Any:
    """The fp32 numbers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def integers(_: Any, address: Any) -> Any:
    """The int64 numbers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), generate


@intrinsic
def small_integers(_: Any, address: Any) -> Any:
    """The bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), generate


@intrinsic
def _power_of_two(_: Any, rounded: Any) -> Any:
    """2^n from n + ROUNDER, whose lowest bits are n: as the exponent of a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bias, shift = (context.get_constant(types.int32, number) for number in (127, 23))
        bits = builder.bitcast(arguments[0], context.get_value_type(types.int32))
        return builder.bitcast(
            builder.shl(builder.add(bits, bias), shift), context.get_value_type(signature.return_type)
        )

    return types.float32(types.float32), generate


@njit(error_model="numpy", fastmath={"contract"})  # not `reassoc`, which would cancel the rounding
def exp(x):
    """e^x within 1e-7 of itself, as vectors take it: 2^n e^r with |r| <= ln(2) / 2 (Cephes' polynomial for e^r).

    Below -87.3 it stays 1.2e-38; from 88.4 on it is infinite.
    """
    x = np.float32(-87.3) if x < np.float32(-87.3) else x
    x = np.float32(88.7) if x > np.float32(88.7) else x
    rounded = x * LOG2_E + ROUNDER
    n = rounded - ROUNDER
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    return (p * r * r + r + ONE) * _power_of_two(rounded)
