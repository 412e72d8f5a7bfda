"""`vllm serve` as a process of the test's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from rollouts.vllm_cpu import CUSTOM_OPS, RELOAD_EXTENSION

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT_S = 400
OPTIONS = (
    "--logprobs-mode=processed_logprobs", "--max-num-seqs=16", "--max-num-batched-tokens=256",
    "--kv-cache-memory-bytes=100000000",
)  # fmt: skip
ON_CPU = (
    "--dtype=float32", "--enforce-eager", f"--worker-extension-cls={RELOAD_EXTENSION}",
    f"--compilation-config={json.dumps({'custom_ops': CUSTOM_OPS})}",
)  # fmt: skip
ON_GPU = ("--dtype=bfloat16", "--gpu-memory-utilization=0.05")


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class VllmProcess:
    """A server of the model in `folder`, started by `start` and killed without warning by `kill`."""

    def __init__(self, folder: Path, log: Path, *, gpu: str | None = None, options: tuple[str, ...] = ()) -> None:
        self.folder, self.log, self.port, self.gpu = folder, log, free_port(), gpu
        self.options = (*OPTIONS, *(ON_CPU if gpu is None else ON_GPU), *options)
        if (
            find_spec("vllm.entrypoints.scale_out") is not None
        ):  # older ones take and give tokens without being asked to
            self.options += ("--enable-scale-out",)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, after every start the same."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns once it answers."""
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "GOMP_SPINCOUNT": "1000",
            # its workers import the extension
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        environment |= {"VLLM_MLA_DISABLE": "1"} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}
        # Not `vllm serve`: of the distribution vllm-cpu it fails, looking for its version under the name vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={self.folder}"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host=127.0.0.1", f"--port={self.port}", *self.options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own group of processes, killed as one
            )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with opener.open(f"{self.url}/health", timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                ended = self._process.poll()
                assert ended is None, f"vllm serve ended with {ended}:\n{self.log.read_text()[-4000:]}"
                assert time.monotonic() < deadline, f"no server yet:\n{self.log.read_text()[-4000:]}"
                time.sleep(0.5)

    def kill(self) -> None:
        """Everything of it, at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
