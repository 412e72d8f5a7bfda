"""Samples from `vllm serve` on other GPUs or machines, one server or several, and sends them the policy's weights.

Prompts wait on one board and every server takes its next when it has room, so the load spreads by itself. A server that
fails puts its prompts back, is waited for with growing pauses, and gets the weights again before it is asked anything:
a prompt's completions come from one version of the weights, and are counted once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist

from policy import Policy
from policy.tokenizer import Tokenizer
from rollouts.engine import VllmServerConfig
from rollouts.sampler import prompt_seeds_of
from rollouts.stop_strings import StopStrings, stop_strings_of
from rollouts.types import Completion, EngineError, EngineStats, OnGroup, SamplingError, SamplingParams
from rollouts.vllm_client import ServedModel, ServerFault, VllmClient, mismatches
from rollouts.vllm_cpu import missing_options
from rollouts.vllm_requests import check_request, completion_of, group_of, request_params
from rollouts.vllm_weights import FolderTransfer, NcclTransfer, WeightTransfer

LONGEST_PAUSE_S = 30.0
"""Between two questions to a server that does not answer."""


@dataclass(slots=True, eq=False)
class Server:
    """A server and what this process knows of it."""

    client: VllmClient
    lock: threading.Lock = field(default_factory=threading.Lock)
    served: ServedModel | None = None
    """As last described."""
    loaded: tuple[str, int] | None = None
    """The start of the server and the version of the weights it was given then."""
    fault: ServerFault | None = None
    """Why it is not ready; None once it is."""


class VllmServerEngine:
    """An `Engine` over servers; `load_weights` sends the weights, and so does whatever finds a server without them."""

    def __init__(self, policy: Policy, config: VllmServerConfig, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.policy_version = 0
        self._turn = threading.Lock()
        self._board, self._is_closed = Board(0), False
        self._stop_strings: StopStrings | None = None
        self._transfer: WeightTransfer = (
            NcclTransfer(config.transfer_host)
            if config.weight_transfer == "nccl"
            else FolderTransfer(config.weights_dir)
        )
        self._servers = [
            Server(
                VllmClient(
                    url,
                    model=config.model,
                    api_key=os.environ.get(config.api_key_env),
                    request_timeout_s=config.request_timeout,
                )
            )
            for url in config.urls
        ]
        self._retry(lambda: self._describe(self._servers))

    @property
    def stats(self) -> EngineStats:
        """Nothing: servers do not say."""
        return EngineStats()

    def load_weights(self, policy: Policy, version: int) -> None:
        """Send them to every server; one that does not answer gets them when it is back, but one must answer.

        Of several ranks that share the servers the first sends, while the others wait. A call of `generate` in another
        thread comes to its end first: all its completions are of one version.
        """
        with self._turn:
            self._load_weights(policy, version)

    def _load_weights(self, policy: Policy, version: int) -> None:
        self.policy, self.policy_version = policy, version
        for server in self._servers:
            server.loaded = None
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not many or dist.get_rank() == 0:
            self._retry(lambda: self._update(self._servers))
        if many:
            dist.barrier()
            if dist.get_rank() > 0:
                self._retry(lambda: self._describe(self._servers))
                for server in self._servers:
                    server.loaded = (server.served.instance, version) if server.served and not server.fault else None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: Sequence[int] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Raises EngineError once no server answered for `retry_timeout` seconds.

        New weights that another thread brings wait for the end of the call, and so does another call.
        """
        with self._turn:
            return self._generate(prompts, num_generations, params, prompt_seeds, on_group)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: Sequence[int] | None,
        on_group: OnGroup | None,
    ) -> list[list[Completion]]:
        context = min(server.served.max_model_len for server in self._servers if server.served)
        check_request(prompts, params, min(context, self.policy.config.max_position_embeddings))
        if not prompts or not num_generations:
            return [[] for _ in prompts]
        self._stop_strings = stop_strings = stop_strings_of(params, self.tokenizer, self._stop_strings)
        seeds = prompt_seeds_of(params, len(prompts)) if prompt_seeds is None else prompt_seeds
        board, version = Board(len(prompts)), self.policy_version
        self._board = board
        if self._is_closed:
            raise EngineError("the engine was closed")

        def ask(server: Server, place: int) -> list[Completion]:
            assert server.served is not None
            wanted = request_params(params, num_generations, seeds[place])
            completions = [
                completion_of(
                    choice["token_ids"],
                    [token["logprob"] for token in choice["logprobs"]["content"]],
                    choice["finish_reason"],
                    params=params,
                    version=version,
                    stop_strings=stop_strings,
                )
                for choice in server.client.complete(server.served.name, list(prompts[place]), wanted)
            ]
            return group_of(completions, num_generations)

        calls = [Call(server=server, board=board, pauses=pauses(self.config.retry_timeout)) for server in self._servers]
        for call in calls:
            for _ in range(min(len(prompts), _room(call.server, num_generations))):
                board.join(partial(self._work, call, ask))
        return board.wait(lambda: "; ".join(str(server.fault) for server in self._servers if server.fault), on_group)

    def reset_prefix_cache(self) -> None:
        """Nothing: who shares a batch on a server depends on timing, and the last bits on that already."""

    def close(self) -> None:
        """Leave the servers, which run on; a call in another thread ends with an error."""
        self._is_closed = True
        self._board.fail(EngineError("the engine was closed"))
        self._transfer.close()

    def _work(self, call: Call, ask: Callable[[Server, int], list[Completion]]) -> None:
        """Take prompts until none is left or the server is given up."""
        while (place := call.board.take()) is not None:
            try:
                if not self._make_ready(call):
                    call.board.put_back(place)
                    return
                call.board.finish(place, ask(call.server, place))
                call.pauses = pauses(self.config.retry_timeout)
            except ServerFault as fault:
                call.server.fault, call.is_ready = fault, False
                call.board.put_back(place)
            except SamplingError as error:
                call.board.fail(error)

    def _make_ready(self, call: Call) -> bool:
        """Have the server up and its weights current, once a call and after every fault; False if it is given up."""
        with call.server.lock:
            while not (call.is_ready or call.is_given_up):
                pause = next(call.pauses, None)
                if pause is None:
                    call.is_given_up = True
                elif call.board.is_over(pause):
                    break
                else:
                    call.is_ready = self._update([call.server])
            return call.is_ready

    def _retry(self, attempt: Callable[[], bool]) -> None:
        for pause in pauses(self.config.retry_timeout):
            time.sleep(pause)
            if attempt():
                return
        faults = "; ".join(str(server.fault) for server in self._servers)
        raise EngineError(_gone(faults))

    def _update(self, servers: Sequence[Server]) -> bool:
        """Send the weights to those of the servers that answer and lack them; whether any server is ready."""
        self._describe(servers)
        wanting = [
            (server, server.served)
            for server in servers
            if server.served and not server.fault and server.loaded != (server.served.instance, self.policy_version)
        ]
        if wanting:
            faults = self._transfer.send(self.policy, [(server.client, served) for server, served in wanting])
            for (server, served), fault in zip(wanting, faults, strict=True):
                server.fault = fault
                server.loaded = None if fault else (served.instance, self.policy_version)
        return any(server.fault is None for server in servers)

    def _describe(self, servers: Sequence[Server]) -> bool:
        """Ask each what it serves and refuse another model; whether any answered."""
        for server in servers:
            try:
                served = server.client.describe()
            except ServerFault as fault:
                server.fault = fault
                continue
            self._check(server.client, served)
            server.served, server.fault = served, None
        return any(server.fault is None for server in servers)

    def _check(self, client: VllmClient, served: ServedModel) -> None:
        if wrong := mismatches(served, self.policy.config):
            raise EngineError(
                f"{client.url} serves another model, {served.name!r} ({'; '.join(wrong)}); serve the model that the "
                "recipe starts from, or change engine.vllm_server.urls"
            )
        if served.logprobs_mode != "processed_logprobs":
            raise EngineError(
                f"{client.url} returns {served.logprobs_mode}; training needs those of the distribution that was "
                "sampled: start it with --logprobs-mode processed_logprobs"
            )
        missing = missing_options(
            self.policy.config,
            is_eager=served.is_eager,
            custom_ops=served.custom_ops,
            worker_extension=served.worker_extension,
        )
        if served.is_on_cpu and missing:
            raise EngineError(
                f"{client.url} runs on a CPU, where vLLM would sample something else than this policy; start it with "
                f"{' '.join(missing)}"
            )
        self._transfer.check(self.policy, (client, served))


class Board:
    """The prompts of one `generate`: waiting, in some server's hands, or finished. Safe among threads."""

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._waiting = deque(range(count))
        self._results: dict[int, list[Completion]] = {}
        self._count, self._workers = count, 0
        self._error: SamplingError | None = None

    def join(self, work: Callable[[], None]) -> None:
        """Have a thread of its own do the work; the process does not wait for it to end."""

        def run() -> None:
            try:
                work()
            finally:
                with self._changed:
                    self._workers -= 1
                    self._changed.notify_all()

        with self._changed:
            self._workers += 1
        threading.Thread(target=run, name="vllm request", daemon=True).start()

    def take(self) -> int | None:
        """A waiting prompt; None once all are finished. Waits while others hold the rest: one may come back."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over())
            return None if self._is_over() else self._waiting.popleft()

    def finish(self, place: int, completions: list[Completion]) -> None:
        """A prompt's completions."""
        with self._changed:
            assert place not in self._results
            self._results[place] = completions
            self._changed.notify_all()

    def put_back(self, place: int) -> None:
        """For another worker."""
        with self._changed:
            self._waiting.appendleft(place)
            self._changed.notify_all()

    def fail(self, error: SamplingError) -> None:
        """End the call with this error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def is_over(self, pause_s: float) -> bool:
        """Whether nothing is left to do, now or at some time within the pause."""
        with self._changed:
            return self._changed.wait_for(self._is_over, pause_s)

    def wait(self, faults: Callable[[], str], on_group: OnGroup | None = None) -> list[list[Completion]]:
        """All completions, [P][G], each prompt's told to `on_group` when they come.

        Raises what `fail` was given, what `on_group` raises, or EngineError if every worker left before the end.
        """
        told = 0
        try:
            while fresh := self._results_after(told, faults):
                for place, completions in fresh:
                    if on_group is not None:
                        on_group(place, completions)
                told += len(fresh)
            return [self._results[place] for place in range(self._count)]
        finally:  # after an interrupt, too, nobody goes on
            self.fail(EngineError("the call has ended"))

    def _results_after(self, told: int, faults: Callable[[], str]) -> list[tuple[int, list[Completion]]]:
        """Those that came after the first `told`, as soon as there is one; none once all were told."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._results) > told or self._is_over() or not self._workers)
            if self._error is not None:
                raise self._error
            fresh = list(self._results.items())[told:]
            if not fresh and told < self._count:
                raise EngineError(_gone(faults()))
            return fresh

    def _is_over(self) -> bool:
        return self._error is not None or len(self._results) == self._count


@dataclass(kw_only=True, slots=True, eq=False)
class Call:
    """One server's part in one `generate`."""

    server: Server
    board: Board
    pauses: Iterator[float]
    """Seconds before each further attempt, since its last answer: a prompt that always fails must end, too."""
    is_ready: bool = False
    """It was up, with the current weights, since the last fault."""
    is_given_up: bool = False
    """It was waited for in vain."""


def pauses(timeout_s: float) -> Iterator[float]:
    """Seconds to wait before each attempt: 0, then 0.5 and doubling up to 30, for as long as `timeout_s` lasts."""
    deadline, pause = time.monotonic() + timeout_s, 0.5
    yield 0.0
    while (left := deadline - time.monotonic()) > 0:
        yield min(pause, left)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _room(server: Server, num_generations: int) -> int:
    """Requests that keep a server full: as many sequences as it decodes at once, and one request to follow."""
    return 2 if server.served is None else -(-server.served.max_num_seqs // num_generations) + 1


def _gone(faults: str) -> str:
    return (
        f"no vLLM server is left: {faults}. Start one again and continue with --resume; how long to wait for it is "
        "engine.vllm_server.retry_timeout"
    )
