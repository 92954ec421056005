"""An actor on each node: it looks, keeps time, writes and reads, and takes part in collectives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.nodes.report import NodeReport, look

SMALL, LARGE = 1 << 10, 8 << 20  # bytes that each rank exchanges: latency, bandwidth
ROUNDS = 5
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Exchange:
    """All-to-all of one rank. latency_s: of SMALL bytes. bytes_per_s: that it sent to others, of LARGE bytes."""

    backend: str
    latency_s: float
    bytes_per_s: float


class Seat:
    """One node's. It holds no CPU; a GPU only where its node has one and none is taken."""

    def look(self, address: str, resources: dict[str, float], storage: str) -> NodeReport:
        return look(address, resources, storage)

    def now(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def free_port(self) -> int:
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def write(self, path: str, text: str) -> str | None:
        """None, or why it could not be written."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text()
        except OSError:
            return None

    def remove(self, folder: str, name: str) -> None:
        """The file that this seat wrote, and the folder with the last of them."""
        with suppress(OSError):
            (Path(folder) / name).unlink(missing_ok=True)
            Path(folder).rmdir()

    def exchange(self, rank: int, world_size: int, master: str, port: int) -> Exchange:
        """All-to-all between all seats, timed over ROUNDS; raises RuntimeError where they can't connect."""
        import os
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        gpu = torch.cuda.is_available()
        backend = "nccl" if gpu else "gloo"
        if master.startswith("127."):  # all on this machine: no card's name stands in the way
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
        store = dist.TCPStore(master, port, world_size, is_master=rank == 0, timeout=timedelta(seconds=TIMEOUT_S))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
        )
        try:
            device = torch.device("cuda" if gpu else "cpu")
            latency = _all_to_all_s(SMALL, world_size, device)
            seconds = _all_to_all_s(LARGE, world_size, device)
            return Exchange(backend, latency, LARGE * (world_size - 1) / world_size / seconds)
        finally:
            dist.destroy_process_group()


def _all_to_all_s(size: int, world_size: int, device: Any) -> float:
    """The fastest of ROUNDS, after one that connects."""
    import torch
    import torch.distributed as dist

    each = max(size // world_size, 1)
    out = torch.zeros(each * world_size, dtype=torch.uint8, device=device)
    into = torch.empty_like(out)
    seconds = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(into, out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


@contextmanager
def seats(nodes: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """A Seat on each node of `ray.nodes()`, ended afterwards."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    made: list[Any] = []
    try:
        for node in nodes:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            gpus = 1 if node["Resources"].get("GPU") else 0
            options = {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": pinned}
            made.append(ray.remote(Seat).options(**options).remote())
        yield made
    finally:
        for seat in made:
            ray.kill(seat)
