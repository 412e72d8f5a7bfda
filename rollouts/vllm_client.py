"""One `vllm serve` over HTTP: what it serves, completions of one prompt, control routes.

The server runs with VLLM_SERVER_DEV_MODE=1, which opens the routes for weights; docs/rollouts.md has the command line.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policy import PolicyConfig
from rollouts.types import EngineError

GENERATE = "/inference/v1/generate"
"""Takes and gives tokens; vLLM 0.22 has it as it is, newer ones have it with `--enable-scale-out`."""
HEALTH_TIMEOUT_S = 120.0
"""For a question that a live server answers soon; the first `/server_info` looks around on its machine for seconds."""


class ServerFault(Exception):
    """A server that did not answer, or not as a live one does; it may be back later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a server says of itself."""

    instance: str
    """Drawn anew whenever the server starts."""
    name: str
    """Under which requests ask for the model."""
    architecture: str
    """Class of the model, one of `architectures` in its `config.json`."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    logprobs_mode: str
    """Which log-probabilities it returns."""
    max_model_len: int
    """Tokens of prompt and completion together."""
    max_num_seqs: int
    """Sequences decoded at once."""
    world_size: int
    """Worker processes that hold weights, over all replicas."""
    weight_backend: str | None
    """Of `--weight-transfer-config`; None without one."""
    is_on_cpu: bool
    is_eager: bool
    """Whether it neither compiles nor captures graphs."""
    custom_ops: list[str]
    """Which of its own kernels vLLM uses, in its notation."""
    worker_extension: str
    """Of `--worker-extension-cls`; empty without one."""


class VllmClient:
    """Speaks with the server at one URL; every method raises ServerFault or EngineError."""

    def __init__(self, url: str, *, model: str | None, api_key: str | None, request_timeout_s: float) -> None:
        self.url = url
        self._model, self._api_key, self._request_timeout_s = model, api_key, request_timeout_s
        # Never through a proxy that the environment names: the servers are on this machine or beside it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def describe(self) -> ServedModel:
        """What is served there now."""
        names = [entry["id"] for entry in self._call("/v1/models")["data"]]
        if self._model is not None and self._model not in names:
            raise EngineError(
                f"{self.url} serves {', '.join(names)}, not {self._model!r}; change engine.vllm_server.model"
            )
        config = self._call("/server_info?config_format=json")["vllm_config"]
        tree = self._call("/collective_rpc", {"method": "get_model_inspection"})["results"][0]
        try:
            return _served_model(self._model or names[0], config, tree)
        except KeyError as missing:
            raise EngineError(f"{self.url} does not say its {missing}; vLLM 0.22 or newer is needed there") from None

    def complete(self, model: str, prompt: list[int], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The finished choices of one prompt, `params["n"]` of them in order, each with token_ids and logprobs."""
        final_only = 2  # vLLM's RequestOutputKind: all choices at the end, not each as it grows
        body = {
            "model": model,
            "token_ids": prompt,
            "sampling_params": {**params, "output_kind": final_only},
            "stream": False,
        }
        answer = self._call(GENERATE, body, timeout_s=self._request_timeout_s)
        choices: list[dict[str, Any]] = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != params["n"]:
            raise ServerFault(f"{self.url} answered with {len(choices)} of {params['n']} completions")
        return choices

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer of a control route, which may take as long as a request; None for an empty one."""
        return self._call(path, body or {}, timeout_s=self._request_timeout_s)

    def _call(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = HEALTH_TIMEOUT_S) -> Any:
        """GET, or POST where there is a body."""
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                content = response.read()
            return json.loads(content) if content else None
        except urllib.error.HTTPError as error:
            raise self._refusal(path, error.code, error.read().decode(errors="replace")) from None
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise ServerFault(f"{self.url} does not answer ({reason})") from None

    def _refusal(self, path: str, status: int, text: str) -> EngineError | ServerFault:
        said = " ".join(text.split())[:500]
        route = path.partition("?")[0]
        if status == 401:
            return EngineError(
                f"{self.url} wants another API key; set the variable that engine.vllm_server.api_key_env names"
            )
        if status == 404 and (route != GENERATE or "Not Found" in text):  # rather than a model that is not there
            option = "--enable-scale-out" if route == GENERATE else "VLLM_SERVER_DEV_MODE=1"
            return EngineError(f"{self.url} has no {route}; start the server with {option}")
        if status in (408, 429) or status >= 500:
            return ServerFault(f"{self.url}{route} failed with status {status}: {said}")
        return EngineError(f"{self.url}{route} refused the request (status {status}): {said}")


def mismatches(served: ServedModel, config: PolicyConfig) -> list[str]:
    """Where the served model is not of the policy's shape, as `key: theirs, not ours`; empty for the same.

    It is the least that tells models apart. What is left, the widths inside a layer, vLLM compares when it loads.
    """
    ours = {
        "architecture": config.family.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
    }
    return [f"{key}: {theirs}, not {ours[key]}" for key in ours if (theirs := getattr(served, key)) != ours[key]]


def _served_model(name: str, config: Mapping[str, Any], tree: str) -> ServedModel:
    model, parallel, transfer = config["model_config"], config["parallel_config"], config["weight_transfer_config"]
    return ServedModel(
        instance=str(config["instance_id"]),
        name=name,
        **_read_tree(tree),
        logprobs_mode=str(model["logprobs_mode"]),
        max_model_len=int(model["max_model_len"]),
        max_num_seqs=int(config["scheduler_config"]["max_num_seqs"]),
        world_size=int(parallel["world_size"]) * int(parallel["data_parallel_size"]),
        weight_backend=transfer and str(transfer["backend"]),
        is_on_cpu=str(config["device_config"]["device"]).startswith("cpu"),
        is_eager=bool(model["enforce_eager"]),
        custom_ops=list(config["compilation_config"]["custom_ops"]),
        worker_extension=str(parallel["worker_extension_cls"]),
    )


def _read_tree(tree: str) -> dict[str, Any]:
    """Architecture and sizes from vLLM's print of its modules (vllm/model_inspection.py); KeyError for another text.

    A line is `(name): Module(sizes)`, two spaces deeper than its parent; alike layers share one: `(1-27): 27 x`.
    """
    lines = tree.splitlines()
    embedding = re.search(r"VocabParallelEmbedding\(.*?embedding_dim=(\d+), org_vocab_size=(\d+)", tree)
    start = next((i for i, line in enumerate(lines) if line.lstrip().startswith("(layers): ")), None)
    architecture = re.match(r"\w+", tree)
    if embedding is None or start is None or architecture is None:
        raise KeyError("model's modules")
    depth, layers = len(lines[start]) - len(lines[start].lstrip()), 0
    for line in lines[start + 1 :]:
        if line.startswith(" " * (depth + 1)):
            alike = re.match(rf"^ {{{depth + 2}}}\([\d, -]+\): (?:(\d+) x )?", line)
            layers += int(alike[1] or 1) if alike else 0
        else:
            break
    return {
        "architecture": architecture[0],
        "vocab_size": int(embedding[2]),
        "hidden_size": int(embedding[1]),
        "num_hidden_layers": layers,
    }
