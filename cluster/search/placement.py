"""What a trial needs of the cluster, granted all at once or not at all: no trial waits for what another holds half of.

A trial's placement group has a bundle for its driver and the data tasks, and one for each worker. Ray reserves a group
whole, so that two trials never hold half of what each needs; one that no cluster could hold is refused beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.config import ClusterConfig
from data_services.schema import UsageError

DRIVER_CPU = 0.01  # of a trial's own process, which waits for its workers
# Bundles by their place in the group: the driver's, the data tasks', and from there on the workers'.
DATA, FIRST_WORKER = 1, 2


def bundles(config: ClusterConfig) -> list[dict[str, float]]:
    """What a trial reserves: its driver, its data tasks, each of its workers."""
    worker: dict[str, float] = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        worker["GPU"] = config.gpus_per_worker
    return [{"CPU": DRIVER_CPU}, {"CPU": config.cpus_for_data}, *([worker] * config.workers)]


def cpus(config: ClusterConfig) -> float:
    return sum(bundle["CPU"] for bundle in bundles(config))


def trials_at_once(config: ClusterConfig, nodes: Sequence[Mapping[str, float]], most: int) -> int:
    """How many trials of this size the nodes, empty, hold side by side, up to `most`. nodes: resources of each.

    Raises UsageError, saying what a trial needs and what there is, where it is none.
    """
    free = [{kind: node.get(kind, 0.0) for kind in ("CPU", "GPU")} for node in nodes]
    count = 0
    while count < most and all(_take(free, bundle) for bundle in sorted(bundles(config), key=_size, reverse=True)):
        count += 1
    if not count:
        total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
        each = f"{config.cpus_per_worker:g} CPU" + f" and {config.gpus_per_worker:g} GPU" * (config.gpus_per_worker > 0)
        raise UsageError(
            f"a trial of cluster.workers={config.workers} can never be placed: it needs {each} for each worker, "
            f"{config.cpus_for_data:g} CPU for data and {DRIVER_CPU:g} for its own process at once, and the cluster "
            f"can have {total['CPU']:g} CPUs and {total['GPU']:g} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}; "
            "lower cluster.workers or what each takes, or add nodes"
        )
    return count


def _take(free: list[dict[str, float]], bundle: dict[str, float]) -> bool:
    """First fit: takes the bundle from the first node that has room for it."""
    for node in free:
        if all(node[kind] >= amount - 1e-9 for kind, amount in bundle.items()):
            for kind, amount in bundle.items():
                node[kind] -= amount
            return True
    return False


def _size(bundle: dict[str, float]) -> tuple[float, float]:
    return bundle.get("GPU", 0.0), bundle["CPU"]
