"""The training loop. It reads top to bottom; the mathematics is behind `step`, the order of rows behind `batches`."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_services.schema import Batch, BatchStream, RunError
from trainers.config import CheckpointConfig

if TYPE_CHECKING:
    from trainers.collectives import Group
    from trainers.faults import Faults
    from trainers.hooks import MetricsSink
    from trainers.saving import CheckpointStore
    from trainers.step import ContrastiveStep


@dataclass(frozen=True)
class Job:
    """What a loop runs.

    save             begins a checkpoint of the state before the step it is given; collective
    saving           writes it beside the steps that follow; None where `save` does all there is to do
    faults           what is done about steps and workers that go wrong
    beat             is called as this worker gets on
    after_step       is called with the number of steps taken, before a checkpoint of them; collective
    peak_flops       of one worker's device, a second
    """

    step: ContrastiveStep
    batches: BatchStream
    start: int
    stop: int
    save: Callable[[int], Any]
    checkpoint: CheckpointConfig
    group: Group
    sink: MetricsSink
    stop_requested: Callable[[], bool]
    peak_flops: float
    faults: Faults
    beat: Callable[[], Any] = lambda: None
    after_step: Callable[[int], Any] = lambda taken: None
    saving: CheckpointStore | None = None


class OutOfStep(Exception):
    """The batches begin at another step than training: whoever began to read them took another checkpoint."""


def run(job: Job) -> int:
    """Trains from `job.start` to `job.stop`; returns the step reached, which a request to stop makes earlier, with its
    checkpoint committed. Raises OutOfStep where the batches don't begin at `job.start`."""
    clock, reached = Clock(), job.start
    if job.start == job.stop:
        return reached
    for batch in job.batches(job.start):
        if batch.step != reached:
            raise OutOfStep(f"batches come from step {batch.step} and training stands at {reached}: begin again")
        clock.received()
        job.beat()
        job.group.reset_traffic()  # what restoring or saving sent is not the step's
        metrics = job.step(batch)
        metrics |= job.faults.judge(batch, metrics, job.step.suspects)
        reached = batch.step + 1
        stopping, busy = report(job, batch, metrics, clock)
        job.after_step(reached)
        job.beat()
        if job.saving:
            job.saving.advance(busy)
        last = reached == job.stop or stopping
        saving = last or reached % job.checkpoint.every_steps == 0
        job.faults.compare(job.step, reached, clock.wait_s, saving)
        if saving:
            job.save(reached)
            job.beat()
        if last:
            if job.saving:
                job.saving.settle()
            return reached
        clock.waiting()
    raise RunError(f"the data ended at step {reached} of {job.stop}; see the log for the reader's error")


class Clock:
    """Splits wall time into waiting for data and computing, in seconds."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        self._mark = time.perf_counter()

    def waiting(self) -> None:
        self._mark = time.perf_counter()

    def received(self) -> None:
        now = time.perf_counter()
        self.wait_s, self._mark = now - self._mark, now

    def computed(self) -> float:
        return time.perf_counter() - self._mark


def report(job: Job, batch: Batch, metrics: Mapping[str, float], clock: Clock) -> tuple[bool, tuple[bool, bool]]:
    """Sums the workers' counters, hands the step's metrics to the sink on rank 0.

    Returns whether a stop was asked for, and whether any worker is busy with a checkpoint, as `CheckpointStore.busy`;
    equal on all workers.
    """
    stop = job.group.rank == 0 and job.stop_requested()
    computed = batch.tokens if job.step.packed else batch.padded_tokens
    writes = job.saving.busy if job.saving else (False, False)
    counts = [job.step.flops(batch), batch.tokens, computed, stop, rows_hash(batch.rows), *writes]
    sums = torch.tensor(counts, dtype=torch.float64, device=job.step.engine.device)
    flops, tokens, padded, stop, taken, writing, copying = job.group.all_reduce(sums, "sum").tolist()
    seconds = clock.computed()
    slowest = sums.new_tensor([seconds, clock.wait_s, float(peak_memory_bytes())])
    seconds, wait_s, memory = job.group.all_reduce(slowest, "max").tolist()
    if job.group.rank == 0:
        whole = seconds + wait_s
        job.sink(
            batch.step,
            dict(metrics)
            | {
                "seconds": whole,
                "data_wait_s": wait_s,
                "pairs_per_s": batch.global_queries / whole,
                "tokens_per_s": tokens / whole,
                "padding_share": 1 - tokens / padded,
                "mfu": flops / (whole * job.peak_flops * job.group.size),
                "peak_memory_bytes": memory,
                "rows_hash": taken,
                "traffic_bytes": float(sum(job.group.traffic.values())),
            },
        )
    return stop > 0, (writing > 0, copying > 0)


def rows_hash(rows: np.ndarray) -> float:
    """Of row numbers [n]: an integer below 2^24 a row, summed, so that neither their order nor their split matters."""
    return float((rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).sum())


def peak_memory_bytes() -> int:
    """The most this process has held: device memory on a GPU, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak_flops(dtype: torch.dtype, device: torch.device, seconds: float = 0.2) -> float:
    """Multiply-adds x 2 a second of a large matrix product on this worker: the denominator of utilisation."""
    size = 8192 if device.type == "cuda" else 512  # on a CPU short enough to come through between other processes
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    del product
    return best
