"""Where the shards of an embedding are written: in this process, or by actors of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_services.embedding.quantise import is_ranged
from data_services.embedding.writer import Job, Writer
from data_services.schema import RunError, UsageError


class Workers(Protocol):
    """Where shards are written; see `in_process` and `on_ray`."""

    def __call__(self, job: Job, numbers: Sequence[int]) -> Iterator[int]:
        """Writes the shards of those numbers (`Writer`); yields each number when it is on disk."""
        ...


def in_process(job: Job, numbers: Sequence[int]) -> Iterator[int]:
    """One shard after another in this process."""
    writer = Writer(job)
    if numbers:
        writer.sample()
    return (writer.shard(number) for number in numbers)


@dataclass(frozen=True)
class OnRay:
    """Ray actors, one model each; a shard whose worker or node dies is written by another.

    threads  of an actor; it takes as many logical CPUs, and `gpus`
    """

    actors: int
    threads: int = 1
    gpus: float = 0

    def __call__(self, job: Job, numbers: Sequence[int]) -> Iterator[int]:
        import ray
        from ray.util import ActorPool

        environment = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": str(self.threads > 1).lower()}
        actor = ray.remote(
            num_cpus=self.threads,
            num_gpus=self.gpus,
            max_restarts=-1,
            max_task_retries=3,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        )(_Actor)
        shared = ray.put(job)
        actors: list[Any] = [actor.remote() for _ in range(min(self.actors, len(numbers)))]
        with _without_trace():
            if numbers and is_ranged(job.config.dtype):
                ray.get(actors[0].sample.remote(shared))
            pool, waiting = ActorPool(actors), list[Any](numbers)
            yield from pool.map_unordered(lambda writer, number: writer.shard.remote(shared, number), waiting)


class _Actor:
    """A `Writer` in a process of its own. The job comes with each call, so that an actor can be restarted."""

    def __init__(self) -> None:
        self._writer: Writer | None = None

    def sample(self, job: Job) -> None:
        self._of(job).sample()

    def shard(self, job: Job, number: int) -> int:
        return self._of(job).shard(number)

    def _of(self, job: Job) -> Writer:
        if self._writer is None:
            self._writer = Writer(job)
        return self._writer


@contextlib.contextmanager
def _without_trace() -> Iterator[None]:
    """The worker's own error in the place of Ray's, which carries it."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, UsageError | RunError):
            raise cause from error
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise RunError(f"a worker that embeds failed: {reason}; what is finished stays, run it again") from error
