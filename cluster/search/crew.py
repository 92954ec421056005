"""The workers of a trial, in one process group that outlives it: trials that need as many follow each other warm.

What a worker does is `Work`. `TrainingWork` is ordinary training (`cluster/worker.py`), cut at the checks: it trains to
one, validates, and waits to be told whether to go on, so that a trial that is stopped there computes nothing in vain.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig
from cluster.prepare import Prepared
from cluster.search.config import SearchConfig
from cluster.search.placement import FIRST_WORKER
from data_services.schema import RunError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from cluster.worker import Training

POLL_S = 0.2
START_TIMEOUT_S = 300.0
COLLECTIVE_TIMEOUT = timedelta(seconds=300)


class Work(Protocol):
    """What each worker of a crew does for a trial; a new one for each trial. Its methods are called on all at once.

    shards   made by the trial's driver: what each worker is given, in rank order
    begin    returns the step it begins with, more than 0 where the trial has a checkpoint
    advance  goes on to a step; returns what was measured there
    end      lets go of everything
    """

    @staticmethod
    def shards(ready: Prepared) -> Sequence[Any]: ...

    def begin(self, ready: Prepared, shard: Any, search: SearchConfig) -> int: ...

    def advance(self, until: int) -> dict[str, float]: ...

    def end(self) -> None: ...


class TrainingWork:
    """Ordinary training, validated with the model that would be exported."""

    def __init__(self) -> None:
        self._training: Training | None = None
        self._feed: Any = None  # a generator of batches

    @staticmethod
    def shards(ready: Prepared) -> Sequence[Any]:
        from cluster.fit import dataset_of

        return dataset_of(ready).streaming_split(ready.recipe.cluster.workers, equal=False)

    def begin(self, ready: Prepared, shard: Any, search: SearchConfig) -> int:
        from cluster.fit import start_of
        from cluster.worker import Task, Training
        from data_services.ray_feed import worker_batches

        self._ready, self._search = ready, search
        task = Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())
        # Before the model is built, so that the first batch is there when it is.
        self._feed = worker_batches(shard, int(os.environ["RANK"]), start_of(ready.run), task.steps)
        self._training = Training(task)
        return self._training.reached

    def advance(self, until: int) -> dict[str, float]:
        from cluster.search.validation import validate

        training, feed = self._training, self._feed
        assert training is not None, "begun"
        training.run(lambda start: feed, until)
        began = time.monotonic()
        metrics = validate(training, self._ready, self._search.queries)
        return metrics | {"validation_seconds": time.monotonic() - began}

    def end(self) -> None:
        if self._feed is not None:
            self._feed.close()
        self._training = self._feed = None
        gc.collect()


class Member:
    """One worker's process, as a Ray actor."""

    def __init__(self, make_work: Callable[[], Work]) -> None:
        self._make_work = make_work
        self._work: Work | None = None

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, address: str, port: int, rank: int, size: int) -> None:
        """Enters the process group; returns when all have."""
        import torch
        import torch.distributed as dist

        # Ray shows each actor its own accelerators only, so that each is the first of its process.
        where = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= where | {"LOCAL_RANK": "0"}
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)

    def begin(self, ready: Prepared, shard: Any, search: SearchConfig) -> int:
        self._work = self._make_work()
        return self._work.begin(ready, shard, search)

    def advance(self, until: int) -> dict[str, float]:
        assert self._work is not None, "begun"
        return self._work.advance(until)

    def end(self) -> None:
        if self._work is not None:
            self._work.end()
        self._work = None


class Crew:
    """The workers of one trial after another, in the placement group of the trial's driver."""

    def __init__(self, config: ClusterConfig, group: PlacementGroup, make_work: Callable[[], Work]) -> None:
        resources: dict[str, Any] = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker}
        make: Any = ray.remote(max_restarts=0, **resources)(Member)
        self._members = [
            make.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, FIRST_WORKER + rank)).remote(
                make_work
            )
            for rank in range(config.workers)
        ]
        address, port = ray.get(self._members[0].address.remote(), timeout=START_TIMEOUT_S)
        size = len(self._members)
        ray.get([m.join.remote(address, port, r, size) for r, m in enumerate(self._members)], timeout=START_TIMEOUT_S)

    def begin(self, ready: Prepared, shards: Sequence[Any], search: SearchConfig) -> list[Any]:
        """Starts `Work.begin` on all; gives what `wait` takes."""
        return [m.begin.remote(ready, shard, search) for m, shard in zip(self._members, shards, strict=True)]

    def advance(self, until: int) -> list[Any]:
        return [member.advance.remote(until) for member in self._members]

    def end(self) -> None:
        """The members are free for another trial. Raises what a member raised; see `kill`."""
        ray.get([member.end.remote() for member in self._members], timeout=START_TIMEOUT_S)

    def kill(self) -> None:
        """At once, whatever they are doing."""
        for member in self._members:
            ray.kill(member)


def wait(
    calls: Sequence[Any], go_on: Callable[[], bool], pulse: Callable[[], Any], stalled_s: float
) -> list[Any] | None:
    """The results of calls on every member, in rank order; None where `go_on` said no meanwhile.

    pulse  changes while there is progress. RunError where it hasn't for `stalled_s` seconds; a member's error as it is.
    """
    waiting, beat, since = list(calls), pulse(), time.monotonic()
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        ray.get(ended)  # the first member that failed ends the wait: the others wait for it in a collective
        if not go_on():
            return None
        if (now := pulse()) != beat:
            beat, since = now, time.monotonic()
        elif time.monotonic() - since > stalled_s:
            raise RunError(f"no step for {stalled_s:g} s (search.stalled_s)")
    return ray.get(list(calls))
