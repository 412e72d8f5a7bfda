"""The part of `vllm serve` that VllmServerEngine speaks with, in a thread; our own engine samples a real policy."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

from policy import load
from policy.tokenizer import Tokenizer
from rollouts import EngineConfig, SamplingParams, make_engine


class PolicyServer(ThreadingHTTPServer):
    """Serves the policy in a folder until it is told of other weights."""

    daemon_threads = True

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        logprobs_mode: str = "processed_logprobs",
        key: str = "",
        device: str = "cuda",
        tokenizer: Tokenizer | None = None,
        num_beyond: int = 0,
        closed: tuple[str, ...] = (),
    ) -> None:
        super().__init__(("127.0.0.1", port), Route)
        self.tokenizer, self.num_beyond = tokenizer, num_beyond
        """So many more tokens come back after a stop string, as of a server that runs ahead."""
        self.closed = closed
        """Routes that are not there, for want of an option."""
        self.engine = make_engine(load(folder), EngineConfig(), tokenizer)
        self.shape = json.loads((folder / "config.json").read_text())
        self.instance, self.logprobs_mode, self.key, self.device = uuid4().hex, logprobs_mode, key, device
        self.lock = threading.Lock()
        self.prompts: list[list[int]] = []
        """Of every request that was answered with completions."""
        self.num_reloads = self.num_faults = 0
        self.faults_to_come = 0
        """So many requests for completions are answered with status 500 first."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def describe(self) -> dict[str, Any]:
        config = {
            "instance_id": self.instance,
            "model_config": {
                "logprobs_mode": self.logprobs_mode,
                "max_model_len": self.shape["max_position_embeddings"],
                "enforce_eager": False,
            },
            "scheduler_config": {"max_num_seqs": 8},
            "parallel_config": {"world_size": 1, "data_parallel_size": 1, "worker_extension_cls": ""},
            "compilation_config": {"custom_ops": ["none"]},
            "device_config": {"device": self.device},
            "weight_transfer_config": None,
        }
        return {"vllm_config": config}

    def inspect(self) -> str:
        """As vLLM prints its modules."""
        vocabulary, layers = self.shape["vocab_size"], self.shape["num_hidden_layers"]
        sizes = f"embedding_dim={self.shape['hidden_size']}, org_vocab_size={vocabulary}"
        return f"""{self.shape["architectures"][0]}(
  (model): DeepseekV2Model()(
    (embed_tokens): VocabParallelEmbedding(num_embeddings=64, num_embeddings_per_partition=64, {sizes}, tp_size=1)
    (layers): ModuleList()(
      (0): DeepseekV2DecoderLayer()(
        (input_layernorm): RMSNorm(hidden_size=32, eps=1e-06)
      )
      (1-{layers - 1}): {layers - 1} x DeepseekV2DecoderLayer()(
        (input_layernorm): RMSNorm(hidden_size=32, eps=1e-06)
      )
    )
    (norm): RMSNorm(hidden_size=32, eps=1e-06)
  )
)"""

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        wanted = body["sampling_params"]
        params = SamplingParams(
            max_completion_length=wanted["max_tokens"],
            temperature=wanted["temperature"],
            top_k=wanted["top_k"],
            top_p=wanted["top_p"],
            min_p=wanted["min_p"],
            stop_token_ids=tuple(wanted["stop_token_ids"]),
            stop_strings=tuple(wanted["stop"]),
        )
        assert wanted["include_stop_str_in_output"]
        assert wanted["detokenize"] == bool(params.stop_strings)
        [group] = self.engine.generate([body["token_ids"]], wanted["n"], params, [wanted["seed"]])
        self.prompts.append(body["token_ids"])
        choices = [
            {
                "index": index,
                "token_ids": [*completion.token_ids, *[5] * self.num_beyond],
                "logprobs": {"content": [{"logprob": x} for x in [*completion.logprobs, *[-1.0] * self.num_beyond]]},
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(group)
        ]
        return {"choices": choices[::-1]}

    def call(self, body: dict[str, Any]) -> str | None:
        if body["method"] == "get_model_inspection":
            return self.inspect()
        assert body["method"] == "reload_weights"
        self.engine = make_engine(load(body["kwargs"]["weights_path"]), EngineConfig(), self.tokenizer)
        self.num_reloads += 1
        return None


class Route(BaseHTTPRequestHandler):
    server: PolicyServer

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self.answer(401, {"error": "Unauthorized"})
        if self.path in self.server.closed:
            return self.answer(404, {"detail": "Not Found"})
        if self.path == "/v1/models":
            return self.answer(200, {"data": [{"id": "tiny"}]})
        if self.path == "/server_info?config_format=json":
            return self.answer(200, self.server.describe())
        return self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in self.server.closed:
            return self.answer(404, {"detail": "Not Found"})
        with self.server.lock:
            if self.path == "/inference/v1/generate":
                if self.server.faults_to_come:
                    self.server.faults_to_come -= 1
                    self.server.num_faults += 1
                    return self.answer(500, {"error": "EngineDeadError"})
                return self.answer(200, self.server.generate(body))
            if self.path == "/collective_rpc":
                return self.answer(200, {"results": [self.server.call(body)]})
            assert self.path == "/reset_prefix_cache"
            return self.answer(200, {"success": True})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Into nowhere."""


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[PolicyServer]:
    """A server that answers for as long as the block lasts."""
    server = PolicyServer(folder, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
