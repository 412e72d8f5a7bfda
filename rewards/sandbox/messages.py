"""Messages between the trainer and a zygote: four bytes of length, JSON, and the descriptors that go with it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
MAX_DESCRIPTORS = 16


def send_message(control: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Write one message with its descriptors. OSError if the other side is gone."""
    data = json.dumps(message).encode()
    framed = len(data).to_bytes(4, "little") + data
    sent = socket.send_fds(control, [framed], list(descriptors)) if descriptors else control.send(framed)
    while sent < len(framed):
        sent += control.send(framed[sent:])


def receive_message(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Read one message and its descriptors, which are the caller's to close; None if the other side is gone.

    OSError if a descriptor was lost or the message is too long; TimeoutError where the socket has a timeout.
    """
    data, descriptors, flags, _ = socket.recv_fds(control, 4, MAX_DESCRIPTORS)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if flags & socket.MSG_CTRUNC:
        raise OSError("a descriptor sent to the sandbox was lost: too many open files")
    header = data + _receive_exactly(control, 4 - len(data)) if data else b""
    if len(header) < 4:
        return None, descriptors
    size = int.from_bytes(header, "little")
    if size > MAX_MESSAGE_BYTES:
        raise OSError(f"a message of {size} bytes (at most {MAX_MESSAGE_BYTES})")
    body = _receive_exactly(control, size)
    return (json.loads(body) if len(body) == size else None), descriptors


def _receive_exactly(control: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer if the other side is gone."""
    parts = []
    while size:
        part = control.recv(size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
