"""One worker process of the grader, as its parent sees it: its socket, what it prints, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from rewards.grader_worker import ENVIRONMENT_MARK, HEADER, pack
from rewards.secrets import without_secrets

MAX_REPLY: Final = 1 << 26
"""Longest reply that is believed, in bytes; anything longer is a channel that a reward wrote into."""
_READS: Final = 64
"""Most reads from one worker in a row; one that prints without end must not hold up the others."""


class WorkerProcess:
    """One running `python -m rewards.grader_worker`, its socket and its output."""

    def __init__(self, cwd: str, pass_env: Collection[str] = ()) -> None:
        with contextlib.ExitStack() as for_worker, contextlib.ExitStack() as on_error:
            self._channel, theirs = socket.socketpair()
            for_worker.enter_context(theirs)
            on_error.enter_context(self._channel)
            lifeline, self._lifeline = os.pipe()
            for_worker.callback(os.close, lifeline)
            on_error.callback(os.close, self._lifeline)
            self._output, output = os.pipe()
            for_worker.callback(os.close, output)
            on_error.callback(os.close, self._output)
            self._process = subprocess.Popen(
                # -P: the folder of the run is no place to import from; -u: what was printed before a crash is not lost
                [sys.executable, "-P", "-u", "-m", "rewards.grader_worker", str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                cwd=cwd,
                env=_make_environment(pass_env),
            )
            on_error.pop_all()
        self._channel.setblocking(False)
        os.set_blocking(self._output, False)
        self._received = bytearray()
        self._printed = b""
        self.is_silent = False
        """True once no reply can come any more."""

    @property
    def descriptors(self) -> tuple[int, int]:
        """What to wait on for reading."""
        return self._channel.fileno(), self._output

    @property
    def pid(self) -> int:
        """Of the worker, and of the group and the session of whatever it starts."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """True once the process is no more, without waiting for it as a parent: its number stays taken."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, text: str, timeout_s: float) -> bool:
        """Sends a message; False if the worker is gone or does not read it in time."""
        if self.has_ended:
            return False
        data = memoryview(pack(text))
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._channel, select.POLLOUT)
        while data:
            try:
                data = data[self._channel.send(data) :]
            except BlockingIOError:
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return False
            except (BrokenPipeError, ConnectionResetError):
                return False
        return True

    def receive(self) -> list[dict[str, Any]]:
        """The replies that have come, without waiting."""
        if self.has_ended:  # looked at first, so that its last words are read below
            self.is_silent = True
        self._read_channel()
        self._read_output()
        replies = []
        while len(self._received) >= HEADER.size:
            (size,) = HEADER.unpack_from(self._received)
            end = HEADER.size + size
            if size > MAX_REPLY:
                self.is_silent = True
            if size > MAX_REPLY or len(self._received) < end:
                break
            try:
                replies.append(json.loads(self._received[HEADER.size : end]))
            except ValueError:
                self.is_silent = True
                break
            del self._received[:end]
        return replies

    def _read_channel(self) -> None:
        try:
            for _ in range(_READS):
                data = self._channel.recv(1 << 18)
                self._received += data
                if not data:
                    self.is_silent = True
                    return
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.is_silent = True

    def _read_output(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS):
                printed = os.read(self._output, 1 << 18)
                self._printed = (self._printed + printed)[-4096:]
                if not printed:
                    return

    def hang_up(self) -> None:
        """Tells the worker to end when it has done what it is doing."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def end(self, within_s: float = 0.0) -> str:
        """Ends the worker and whatever it started, by force after `within_s`; says how it ended."""
        deadline = time.monotonic() + within_s
        while not (has_ended := self.has_ended) and time.monotonic() < deadline:
            time.sleep(0.002)
        # Before it is waited for: until then its number cannot be given to another group of processes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        code = self._process.wait()
        self._channel.close()
        os.close(self._output)
        os.close(self._lifeline)
        if not has_ended:
            how = "stopped answering"
        elif code >= 0:
            how = f"exited with status {code}"
        else:
            how = f"was ended by {signal.Signals(-code).name}"
        if has_ended and code == -signal.SIGKILL:
            how += " (out of memory?)"
        last_words = self._printed.decode(errors="replace").strip().splitlines()
        return f"the worker {how}" + (f"; it printed last: {last_words[-1][:200]}" if last_words else "")


def _make_environment(pass_env: Collection[str]) -> dict[str, str]:
    environment = {**without_secrets(os.environ, pass_env), ENVIRONMENT_MARK: "1"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # The workers are the parallelism; a thread, and an arena of malloc, for each of 100 cores would use up memory_mb.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"):
        environment.setdefault(name, "1")
    return environment
