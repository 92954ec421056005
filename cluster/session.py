"""The connection to Ray: a cluster in this process or a running one, checked before work starts."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config import ClusterConfig
from cluster.nodes.report import versions
from cluster.nodes.verdicts import differing_versions
from data_services.schema import RunError, UsageError

CONNECT_TIMEOUT_S = 5.0
STORAGE_TIMEOUT_S = 60.0
OBJECT_STORE_BYTES = 1 << 30

# Read by Ray when it is imported or when it starts processes; a value the user has set stays.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # Idle workers started ahead have no runtime environment, so none of ours could take one of them.
    "RAY_prestart_worker_first_driver": "0",
}
# The same, of a cluster in this process: no cloud tells it that a node will be taken away.
_ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@dataclass(frozen=True)
class Session:
    """A live connection. address: of the cluster that was joined, None for one in this process."""

    address: str | None
    resources: dict[str, float]
    nodes: int

    def as_dict(self) -> dict[str, Any]:
        return {"address": self.address, "resources": self.resources, "nodes": self.nodes}


def worker_env(config: ClusterConfig) -> dict[str, str]:
    """Environment of every Ray process of a run. Threads are explicit: Ray's own choice is one each."""
    return {"OMP_NUM_THREADS": str(config.threads), "TOKENIZERS_PARALLELISM": "false"}


def cluster_address(config: ClusterConfig) -> str | None:
    """RAY_ADDRESS, else the recipe's cluster.address; None means a cluster in this process."""
    address = os.environ.get("RAY_ADDRESS") or config.address
    return None if address in (None, "", "local") else address


@contextmanager
def connect(
    config: ClusterConfig, storage: Path, env: dict[str, str] | None = None, cpus: int | None = None
) -> Iterator[Session]:
    """`join`, and before anything starts: workers can be placed, the nodes are alike and all see `storage`.

    Raises UsageError (no such cluster, more workers than it can hold) or RunError (storage not shared, a node with
    other versions), within seconds.
    """
    with join(config, env, cpus) as session:
        check_placement(config, nodes_to_be(config.workers + 1))
        check_nodes(storage)
        yield session


@contextmanager
def join(config: ClusterConfig, env: dict[str, str] | None = None, cpus: int | None = None) -> Iterator[Session]:
    """Connects, and disconnects at the end.

    `env` joins the environment of every Ray process. cpus: logical ones of a cluster in this process, None: room for
    one run. A connection that exists already is used and left open. Raises UsageError where there is no such cluster.
    """
    address = cluster_address(config)
    wanted = _QUIET if address else _QUIET | _ALONE
    os.environ |= {k: v for k, v in wanted.items() if k not in os.environ}
    import ray

    ours = not ray.is_initialized()
    if ours:
        runtime_env = {"env_vars": worker_env(config) | (env or {})}
        if address is None:
            _check_machine(config)
            _start_local(config, runtime_env, cpus)
        else:
            _join(address, runtime_env)
    try:
        yield Session(address, ray.cluster_resources(), sum(n["Alive"] for n in ray.nodes()))
    finally:
        if ours:
            ray.shutdown()


def _start_local(config: ClusterConfig, runtime_env: dict[str, Any], cpus: int | None) -> None:
    import ray

    # Logical CPUs: data tasks must find some beside the workers, however few the machine has.
    cpus = cpus or config.workers * config.cpus_per_worker + config.cpus_for_data + 1
    free = psutil.virtual_memory().available
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=None if config.gpus_per_worker else 0,
            object_store_memory=min(OBJECT_STORE_BYTES, max(free // 8, 128 << 20)),
            # The dashboard would be a dozen processes and 900 MB. Without it an actor of Ray Train logs an error
            # every second, so nothing of the workers' logs is printed: failures come back as exceptions.
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=runtime_env,
        )
    except Exception as error:  # Ray has no class of its own for a node that didn't come up in its 30 s
        load = psutil.getloadavg()[0]
        raise RunError(
            f"Ray didn't start on this machine: {str(error).splitlines()[0]} The load is {load:.1f} on "
            f"{psutil.cpu_count()} cores; run the command again when the machine is less busy"
        ) from error


def _join(address: str, runtime_env: dict[str, Any]) -> None:
    import ray

    if address != "auto":
        _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines() or [repr(error)]
        raise UsageError(
            f"the Ray cluster at {address} can't be joined: {told[0]} (RAY_ADDRESS or cluster.address; a "
            "cluster with token authentication needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)"
        ) from error


def _check_reachable(address: str) -> None:
    """Ray itself waits two minutes for a head that isn't there."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"{address!r} is no address of a cluster: write host:port (RAY_ADDRESS or cluster.address)")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UsageError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or unset "
            "RAY_ADDRESS and cluster.address for one in this process"
        ) from error


def _check_machine(config: ClusterConfig) -> None:
    """A cluster in the process has as many logical CPUs as asked for: the machine's cores bound it instead."""
    cores = os.cpu_count() or 1
    if config.workers * config.cpus_per_worker > 4 * max(cores, 2):
        raise UsageError(
            f"cluster.workers={config.workers} of {config.cpus_per_worker} CPU can't be placed: this machine has "
            f"{cores} cores, room for {4 * max(cores, 2) // config.cpus_per_worker} that share them; lower "
            "cluster.workers, or name a cluster in RAY_ADDRESS"
        )


def nodes_to_be(enough: int) -> list[dict[str, float]]:
    """Resources of every node that is up, and of those that an autoscaler may add: `enough` of a kind without limit."""
    import ray
    from ray._private.state import state

    up = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()  # what the autoscaler has told the cluster; None without one
    groups = [(dict(g.resources), g.max_count) for g in config.node_group_configs] if config else []
    return [*up, *nodes_to_come(up, groups, enough)]


def nodes_to_come(
    up: list[dict[str, float]], groups: list[tuple[dict[str, float], int]], enough: int
) -> list[dict[str, float]]:
    """groups: (resources of a node, most nodes, -1 for no limit) of each kind that an autoscaler adds."""
    coming = []
    for resources, most in groups:
        alike = sum(all(node.get(kind, 0) == resources.get(kind, 0) for kind in ("CPU", "GPU")) for node in up)
        coming += [resources] * (enough if most < 0 else min(enough, max(0, most - alike)))
    return coming


def check_placement(config: ClusterConfig, nodes: list[dict[str, float]]) -> None:
    """Raises UsageError where the nodes, even empty, can't hold every worker and a CPU for data beside them.

    nodes: resources of each that is up or may come.
    """
    cpu, gpu = float(config.cpus_per_worker), float(config.gpus_per_worker)
    room = 0
    for node in nodes:
        fits = int(node.get("CPU", 0) // cpu)
        room += min(fits, int(node.get("GPU", 0) // gpu)) if gpu else fits
    cpus, gpus = (sum(n.get(kind, 0) for n in nodes) for kind in ("CPU", "GPU"))
    there = f"the cluster can have {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    each = f"{cpu:g} CPU" + (f" and {gpu:g} GPU" if gpu else "")
    if room < config.workers:
        raise UsageError(
            f"cluster.workers={config.workers} of {each} can never be placed: {there}, room for {room}; "
            "lower cluster.workers or what each takes, or add nodes"
        )
    if cpus - config.workers * cpu < 1:
        raise UsageError(
            f"cluster.workers={config.workers} of {each} leave no CPU to read data: {there}; "
            "lower cluster.workers or add nodes"
        )


def check_nodes(storage: Path) -> None:
    """Every other node reads what is written here, and has the versions that are here.

    Raises RunError that names the node, and the path or the versions.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    probe, secret = storage / f".shared-{uuid.uuid4().hex}", uuid.uuid4().hex
    try:
        storage.mkdir(parents=True, exist_ok=True)
        probe.write_text(secret)
    except OSError as error:
        raise RunError(f"storage {storage} can't be written: {error.strerror}") from error
    try:
        read = ray.remote(num_cpus=0, max_retries=0)(_seen)
        asked = {}
        for node in others:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"]] = read.options(scheduling_strategy=pinned).remote(str(probe))
        for address, answer in asked.items():
            text, there = _answer(answer)
            if told := differing_versions({"this node": versions(), address: there}):
                raise RunError(f"the nodes differ: {told}; install requirements.lock on each, with the same Python")
            if text != secret:
                raise RunError(
                    f"node {address} doesn't see {storage}, which was written on this one: all nodes must "
                    "share it; set cluster.storage (or GYRE_HOME) to a folder they share"
                )
    finally:
        probe.unlink(missing_ok=True)


def _answer(reference: Any) -> tuple[str | None, dict[str, str]]:
    import ray

    try:
        return ray.get(reference, timeout=STORAGE_TIMEOUT_S)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayTaskError, ray.exceptions.RayError) as error:
        raise RunError(f"a node couldn't be asked whether it sees the storage: {error}") from error


def _seen(path: str) -> tuple[str | None, dict[str, str]]:
    """(what the file holds, None without one; the versions) on the node where it runs."""
    try:
        return Path(path).read_text(), versions()
    except OSError:
        return None, versions()
