"""A function in a thread of its own; what it returns or raises comes out where it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_apart(function: Callable[[], T], name: str) -> Future[T]:
    """Calls `function` in a thread called `name` that the process does not wait for when it ends.

    Not an executor of the standard library: the interpreter joins the threads of those before it leaves, however long.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
