"""Files without a name: what a run reads and writes, so that nobody ever waits at a pipe that a program holds open."""

from __future__ import annotations

import os
import sys
import tempfile


def open_anonymous_file(data: bytes = b"") -> int:
    """A descriptor, the caller's to close, at the start of an unnamed file of `data`. OSError if there is no room."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("run")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_file(descriptor: int, max_bytes: int) -> bytes:
    """The first `max_bytes` of a file, wherever its position stands."""
    parts, offset, end = [], 0, min(max_bytes, os.fstat(descriptor).st_size)
    while offset < end and (part := os.pread(descriptor, min(1 << 20, end - offset), offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def read_tail(descriptor: int, max_bytes: int) -> bytes:
    """The last `max_bytes` of a file."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, max_bytes, max(0, size - max_bytes))
