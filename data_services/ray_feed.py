"""The plan executed by Ray Data on any CPU of the cluster.

A Ray Data task takes a *unit*, a few consecutive steps. It reads and tokenises each global batch once, deals it to
the workers, and yields one block of one row per worker. With `preserve_order`, `streaming_split(equal=False)`
hands blocks of one row out in turn, so worker r receives row r of every step whatever the consumers' speed, and
checks that it did.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from data_services.collate import from_arrow, share_batch, to_arrow
from data_services.schema import Batch, RunError
from data_services.stream import Reader

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data
    import ray.train

UNIT_ROWS = 1 << 13  # a task takes as many steps as make about so many rows
MAX_UNITS = 512  # but a run has about so many tasks at most, whatever its length


@dataclass(frozen=True)
class Units:
    """The steps start … stop-1 in runs, each the work of one task.

    Runs are 1, 1, 2, 4, … steps long, so that the first batch doesn't wait for a whole unit, and then `largest`.
    Ray Data prepares every task's input before it starts (about 1 ms each): `of` keeps their number bounded.
    """

    start: int
    stop: int
    largest: int  # a power of two

    @classmethod
    def of(cls, start: int, stop: int, batch: int) -> Units:
        steps = max(UNIT_ROWS // batch, (stop - start) // MAX_UNITS, 1)
        return cls(start, stop, 1 << (steps - 1).bit_length())

    def steps(self, unit: int) -> range:
        """The steps of a unit; empty beyond the last."""
        return range(self._edge(unit), self._edge(unit + 1))

    def __len__(self) -> int:
        doublings, rest = self.largest.bit_length(), self.stop - self.start - self.largest
        if rest <= 0:
            return max(self.stop - self.start - 1, 0).bit_length() + (self.stop > self.start)
        return doublings + -(-rest // self.largest)

    def _edge(self, unit: int) -> int:
        doublings = self.largest.bit_length()
        if unit == 0:
            done = 0
        elif unit <= doublings:
            done = 1 << (unit - 1)
        else:
            done = (unit - doublings + 1) * self.largest
        return min(self.start + done, self.stop)


@functools.lru_cache(maxsize=2)
def _unpickled(reader: bytes) -> Reader:
    """One reader a process: unpickling opens tokenizer and files, and every task brings the pickle along."""
    return pickle.loads(reader)


def _deal_unit(table: pa.Table, reader: bytes, units: Units, world_size: int, budget_tokens: int) -> Iterator[pa.Table]:
    """Runs in a Ray Data task: `world_size` one-row tables for each step of the unit, in order."""
    (unit,) = table.column("id").to_pylist()
    read = _unpickled(reader)
    for t in units.steps(unit):
        for rank, batch in enumerate(share_batch(read(t), world_size, budget_tokens)):
            yield to_arrow(batch, rank)


def ray_dataset(
    reader: Reader,
    world_size: int,
    start: int,
    budget_tokens: int,
    read_ahead_mib: int = 256,
) -> ray.data.Dataset:
    """The plan from step `start` on as a dataset of one row, and one block, per (step, rank).

    read_ahead_mib bounds the object store memory of batches that wait for the workers. Split it with
    `split_config()` in Ray Train, or with `streaming_split(world_size, equal=False)`.
    """
    import ray.data

    units = Units.of(start, reader.plan.steps, reader.plan.batch)
    blocks = max(len(units), 1)
    dataset = ray.data.range(blocks, override_num_blocks=blocks)
    context = dataset.context  # this dataset's own; the process's stays as it is
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # bytes: every row a block, since streaming_split deals out blocks
    context.execution_no_progress_timeout_s = -1  # a trainer that pauses, to evaluate say, is no failure
    context.execution_options = _execution_options(read_ahead_mib)
    deal = functools.partial(
        _deal_unit,
        reader=ray.cloudpickle.dumps(reader),  # by value what a notebook defines
        units=units,
        world_size=world_size,
        budget_tokens=budget_tokens,
    )
    return dataset.map_batches(deal, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def _execution_options(read_ahead_mib: int) -> ray.data.ExecutionOptions:
    from ray.data import ExecutionOptions, ExecutionResources

    limits = ExecutionResources.for_limits(object_store_memory=read_ahead_mib << 20)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)


def split_config() -> ray.train.DataConfig:
    """How Ray Train splits a `ray_dataset`: row r of every step to worker r.

    Ray's own DataConfig splits with equal=True, which drops a remainder and holds the first batch back, and
    replaces the dataset's execution options.
    """
    import ray.train

    class RowOfEachStep(ray.train.DataConfig):
        def configure(
            self, datasets: dict[str, ray.data.Dataset], world_size: int, *_: Any, **__: Any
        ) -> list[dict[str, ray.data.DataIterator]]:
            splits = {name: d.streaming_split(world_size, equal=False) for name, d in datasets.items()}
            return [{name: its[rank] for name, its in splits.items()} for rank in range(world_size)]

    return RowOfEachStep()


class BatchSource(Protocol):
    """What `ray.train.get_dataset_shard` and `streaming_split` give a worker."""

    def iter_batches(self, **options: Any) -> Iterable[Any]: ...


def worker_batches(shard: BatchSource, rank: int, start: int, stop: int) -> Iterator[Batch]:
    """The batches start … stop-1 of one worker. Fetching begins at the call, not at the first `next`.

    Raises RunError where reading fails, the feed ends early, or it hands out another worker's row or step.
    """
    tables = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)
    rows = (table for table in tables)
    # Ray starts to work at the first `next`; by then the model may have been built.
    first = ThreadPoolExecutor(1, "first-batch").submit(next, rows, None)
    return _checked(first, rows, rank, start, stop)


def _checked(first: Future[Any], rows: Generator[Any], rank: int, start: int, stop: int) -> Iterator[Batch]:
    table = _fetched(first.result)
    with contextlib.closing(rows):  # whoever stops early stops the reading too
        for step in range(start, stop):
            if table is None:
                raise RunError(f"the data feed ended before step {step}; the plan goes on to step {stop - 1}")
            batch, of_rank = from_arrow(table)
            if (batch.step, of_rank) != (step, rank):
                raise RunError(
                    f"the data feed gave worker {rank} the rows of worker {of_rank}, step {batch.step}, where "
                    f"step {step} was due: split it with split_config(), over as many workers as it was made for"
                )
            yield batch
            table = _fetched(lambda: next(rows, None)) if step + 1 < stop else None


def _fetched(fetch: Callable[[], Any]) -> Any:
    """The next row; RunError with the sentence of what failed in the data task, without Ray's trace."""
    import ray.exceptions

    try:
        return fetch()
    except ray.exceptions.RayError as error:
        cause: BaseException = error
        while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
            cause = inner
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise RunError(f"the data feed failed: {reason}") from error
