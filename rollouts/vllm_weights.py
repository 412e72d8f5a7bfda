"""How a policy's weights reach `vllm serve`, always through vLLM's own reloading under Hugging Face's names.

`folder` writes a checkpoint that the server reads: any device, one machine or a shared file system. `nccl` speaks
vLLM's weight-transfer protocol and broadcasts from this process's GPU to the workers', tensor by tensor.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from policy import Policy, save
from policy.checkpoint import checkpoint_tensors
from rollouts.types import EngineError
from rollouts.vllm_client import ServedModel, ServerFault, VllmClient
from rollouts.vllm_cpu import RELOAD_EXTENSION

Target = tuple[VllmClient, ServedModel]


class WeightTransfer(Protocol):
    """One way of moving weights."""

    def check(self, policy: Policy, target: Target) -> None:
        """Raise EngineError, with the remedy, where this way is closed."""
        ...

    def send(self, policy: Policy, targets: Sequence[Target]) -> list[ServerFault | None]:
        """Give the weights to each server and have it forget what it cached under the old ones; [targets] faults."""
        ...

    def close(self) -> None:
        """Leave the servers."""
        ...


def trunk_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """What vLLM samples from, by name: the checkpoint without MTP modules; views, so nothing is copied."""
    layers = policy.config.num_hidden_layers
    for name, tensor in checkpoint_tensors(policy):
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or int(parts[2]) < layers:
            yield name, tensor.detach()


class FolderTransfer:
    """Through files below `root` (the system's folder for such, if None), removed once every server has read them."""

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def check(self, policy: Policy, target: Target) -> None:
        """A folder is always there."""

    def send(self, policy: Policy, targets: Sequence[Target]) -> list[ServerFault | None]:
        """Raises EngineError where the files cannot be written here or read there."""
        if self.root is not None:
            self.root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="grpo_weights_", dir=self.root) as folder:
            try:
                Path(folder).chmod(0o755)  # the server may run as somebody else
                save(policy, folder)
            except OSError as error:
                raise EngineError(
                    f"the weights cannot be written to {folder} ({error}); set engine.vllm_server.weights_dir"
                ) from None
            with ThreadPoolExecutor(max_workers=len(targets)) as pool:
                return list(pool.map(lambda target: self._reload(target[0], target[1], folder), targets))

    def close(self) -> None:
        """Nothing is left behind."""

    def _reload(self, client: VllmClient, served: ServedModel, folder: str) -> ServerFault | None:
        reload: list[dict[str, Any]] = [{"method": "reload_weights", "kwargs": {"weights_path": folder}}]
        if served.worker_extension == RELOAD_EXTENSION:
            reload = [{"method": "before_reload"}, *reload, {"method": "after_reload"}]
        try:
            for call in reload:
                client.post("/collective_rpc", call)
        except ServerFault as fault:
            try:
                client.describe()
            except ServerFault:
                return fault
            raise EngineError(
                f"{fault}; it is up, but did not take the weights from {folder}: engine.vllm_server.weights_dir must "
                "be the same folder on both machines. Start the server again: its weights may be half replaced"
            ) from None
        return _forget_cache(client)


class NcclTransfer:
    """Between GPUs: a group of this process and one server's workers, made once for every start of the server."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._groups: dict[str, tuple[str, Any]] = {}

    def check(self, policy: Policy, target: Target) -> None:
        """Both sides need a GPU, and the server its option."""
        client, served = target
        if policy.device.type != "cuda":
            raise EngineError(
                f"engine.vllm_server.weight_transfer: nccl needs the policy on a GPU, it is on {policy.device}; "
                "choose folder"
            )
        if served.weight_backend != "nccl":
            raise EngineError(
                f"{client.url} has weight transfer {served.weight_backend}; start it with "
                """--weight-transfer-config '{"backend": "nccl"}', or set engine.vllm_server.weight_transfer: folder"""
            )

    def send(self, policy: Policy, targets: Sequence[Target]) -> list[ServerFault | None]:
        """One server after the other."""
        return [self._send(policy, client, served) for client, served in targets]

    def close(self) -> None:
        """Drop the groups; the servers' ends go with their next one."""
        self._groups.clear()

    def _send(self, policy: Policy, client: VllmClient, served: ServedModel) -> ServerFault | None:
        described = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in trunk_tensors(policy)]
        names, dtypes, shapes = zip(*described, strict=True)
        update = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        try:
            group, stream = self._group(policy, client, served), torch.cuda.current_stream()
            client.post("/start_weight_update")
            with ThreadPoolExecutor(max_workers=1) as pool:  # the server receives while this thread sends
                received = pool.submit(client.post, "/update_weights", {"update_info": update})
                for _, tensor in trunk_tensors(policy):
                    group.broadcast(tensor.contiguous(), src=0, stream=stream)
                stream.synchronize()
                received.result()
            client.post("/finish_weight_update")
        except ServerFault as fault:
            self._groups.pop(client.url, None)
            return fault
        return _forget_cache(client)

    def _group(self, policy: Policy, client: VllmClient, served: ServedModel) -> Any:
        """The communicator with this start of the server; its workers are ranks 1 and up."""
        instance, group = self._groups.get(client.url, ("", None))
        if instance == served.instance:
            return group
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        world_size = served.world_size + 1
        meeting = {
            "master_address": self.host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": world_size,
        }
        with ThreadPoolExecutor(max_workers=1) as pool:  # both sides wait for each other in here
            joined = pool.submit(client.post, "/init_weight_transfer_engine", {"init_info": meeting})
            store = StatelessProcessGroup.create(host=self.host, port=port, rank=0, world_size=world_size)
            group = PyNcclCommunicator(store, device=policy.device)
            joined.result()
        self._groups[client.url] = (served.instance, group)
        return group


def _forget_cache(client: VllmClient) -> ServerFault | None:
    """Cached prefixes are keys and values of the old weights."""
    try:
        answer = client.post("/reset_prefix_cache")  # vLLM 0.22 answers with nothing, newer ones say whether it worked
    except ServerFault as fault:
        return fault
    if answer is not None and not answer["success"]:
        return ServerFault(f"{client.url} did not reset its prefix cache; does something else use the server?")
    return None
