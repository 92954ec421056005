"""The whole cluster from the driver: reports, clocks, storage, exchange; and what each finding asks for."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.doctor import Finding
from cluster.nodes.report import NodeReport
from cluster.nodes.seat import TIMEOUT_S, Exchange, seats
from cluster.nodes.verdicts import judge_clocks, judge_exchange, judge_nodes, judge_storage
from cluster.paths import run_home
from data_services.schema import RunError

CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class ClusterDiagnosis:
    """All by the names of nodes. exchange: empty for one node, or where it failed. clock_s: ahead of the driver."""

    nodes: dict[str, NodeReport]
    clock_s: dict[str, float]
    exchange: dict[str, Exchange]
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return all(f.verdict != "problem" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"healthy": self.healthy}


def examine_cluster(config: ClusterConfig | None = None) -> ClusterDiagnosis:
    """Looks at every node of the cluster that RAY_ADDRESS names, or of one in this process.

    Raises UsageError where it can't be joined, RunError where a node doesn't answer within TIMEOUT_S.
    """
    from cluster.session import join

    config = config or ClusterConfig()
    storage = run_home(config.storage)
    with join(config):
        import ray

        nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeManagerAddress"], n["NodeID"]))
        names = _names(nodes)
        with seats(nodes) as placed:
            told = zip(placed, nodes, strict=True)
            asked = [s.look.remote(n["NodeManagerAddress"], n["Resources"], str(storage)) for s, n in told]
            reports: list[NodeReport] = _answers(asked)
            clock = {name: _ahead_s(seat) for name, seat in zip(names, placed, strict=True)}
            unshared = _unshared(placed, names, storage)
            exchange, failure = _exchange(placed, nodes)
    findings = [
        *judge_nodes(dict(zip(names, reports, strict=True))),
        judge_clocks(clock),
        judge_storage(storage, len(nodes), unshared),
        judge_exchange(dict(zip(names, exchange, strict=False)), failure),
    ]
    by_name = dict(zip(names, reports, strict=True))
    return ClusterDiagnosis(by_name, clock, dict(zip(names, exchange, strict=False)), findings)


def _names(nodes: list[dict[str, Any]]) -> list[str]:
    """Addresses, numbered where several nodes stand on one machine."""
    seen: dict[str, int] = {}
    names = []
    for node in nodes:
        address = node["NodeManagerAddress"]
        seen[address] = seen.get(address, 0) + 1
        names.append(address if seen[address] == 1 else f"{address} #{seen[address]}")
    return names


def _answers(asked: list[Any]) -> list[Any]:
    import ray

    try:
        return ray.get(asked, timeout=TIMEOUT_S)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        raise RunError(f"a node doesn't answer within {TIMEOUT_S:.0f} s: {str(error).splitlines()[0]}") from error


def _ahead_s(seat: Any) -> float:
    """How far a node's clock is ahead of this one, from the question that was answered fastest (Cristian 1989)."""
    asked = []
    for _ in range(CLOCK_ROUNDS):
        before = time.time()
        (there,) = _answers([seat.now.remote()])
        after = time.time()
        asked.append((after - before, there - (before + after) / 2))
    return min(asked)[1]


def _unshared(placed: list[Any], names: list[str], storage: Path) -> list[str]:
    """What goes wrong where each node writes and the next reads; one alone writes and reads."""
    folder = storage / f".shared-{uuid.uuid4().hex}"
    wrong = []
    try:
        for i, name in enumerate(names):
            reader = (i + 1) % len(names)
            path, text = str(folder / str(i)), uuid.uuid4().hex
            (failed,) = _answers([placed[i].write.remote(path, text)])
            if failed:
                wrong.append(f"{name} can't write: {failed}")
            elif _answers([placed[reader].read.remote(path)]) != [text]:
                wrong.append(f"{names[reader]} doesn't see what {name} wrote")
    finally:
        for i, seat in enumerate(placed):
            _answers([seat.remove.remote(str(folder), str(i))])
    return wrong


def _exchange(placed: list[Any], nodes: list[dict[str, Any]]) -> tuple[list[Exchange], str]:
    """(of each node, ""), or (nothing, why not)."""
    if len(placed) < 2:
        return [], ""
    (port,) = _answers([placed[0].free_port.remote()])
    master = nodes[0]["NodeManagerAddress"]
    asked = [seat.exchange.remote(rank, len(placed), master, port) for rank, seat in enumerate(placed)]
    import ray

    try:
        return ray.get(asked, timeout=3 * TIMEOUT_S), ""
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return [], lines[-1].strip()
