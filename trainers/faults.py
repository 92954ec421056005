"""What a run does about errors that end no process: steps that aren't finite, losses that jump, workers that diverge
or lag behind.

Each is written to a log, once, with the rows of its batch where they are known.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_services.schema import SOURCE_SHIFT, Batch, RunError
from trainers.collectives import Group
from trainers.config import FaultsConfig
from trainers.pace import Pace, WorkerPace, slowest
from trainers.replicas import Diverged, check_replicas, replicas_of

if TYPE_CHECKING:
    from trainers.step import ContrastiveStep

WINDOW, FEWEST = 50, 20  # losses that a spike is measured against, and how many there must be
LEAST_DEVIATION = 0.01  # of the median: a loss that has hardly moved doesn't spike at its first move
NAMED_ROWS = 8  # rows that a sentence names; the log has all
Tell = Callable[[Mapping[str, Any]], None]


class Faults:
    """Watches the steps of a run, from the `state` of its checkpoint on. All workers call the same methods in turn.

    tell     receives each fault on rank 0: `kind`, `step`, `text` and what else is known
    sources  names of the plan's, for rows
    paces    receives every worker's times at each comparison, on rank 0
    """

    def __init__(
        self,
        config: FaultsConfig,
        group: Group,
        tell: Tell = lambda fault: None,
        state: Mapping[str, Any] | None = None,
        sources: Sequence[str] = (),
        paces: Callable[[list[WorkerPace]], None] = lambda paces: None,
    ) -> None:
        self.config, self._group, self._tell, self._paces = config, group, tell, paces
        self._sources = sources
        kept = state or {}
        self.skipped, self.in_a_row, self.spikes = (kept.get(key, 0) for key in ("skipped", "in_a_row", "spikes"))
        self._losses = deque(kept.get("losses", ()), WINDOW)
        self._pace = Pace(group)
        self._slow: int | None = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return counts | {"losses": list(self._losses)}

    def judge(self, batch: Batch, metrics: Mapping[str, float], suspects: np.ndarray) -> dict[str, float]:
        """What a step's metrics say: metric `spike`. Collective where the step was skipped.

        suspects  this worker's rows of a skipped batch whose own vectors weren't finite

        Raises RunError, on every worker, where too many steps were skipped.
        """
        if metrics["skipped"]:
            self._count_skipped(batch, metrics, suspects)
            return {"spike": 0.0}
        self.in_a_row = 0
        return {"spike": float(self._is_spike(batch.step, metrics["loss"]))}

    def compare(self, step: ContrastiveStep, taken: int, data_wait_s: float, due: bool = False) -> None:
        """Adds this worker's times of the step; every `compare_every_steps`, and where a checkpoint is `due`, looks
        for workers that diverged, and for slow ones. Raises `Diverged`. Collective."""
        self._pace.add(step.encoding.seconds, data_wait_s)
        regular = taken % self.config.compare_every_steps == 0
        if not (regular or due):
            return
        try:
            check_replicas(replicas_of(step), self._group)
        except Diverged as error:
            self._note("diverged", taken - 1, f"{error}; the workers begin again from the last checkpoint")
            raise
        if regular:
            self._compare_times(taken)

    def _count_skipped(self, batch: Batch, metrics: Mapping[str, float], suspects: np.ndarray) -> None:
        self.skipped += 1
        self.in_a_row += 1
        of_workers = self._group.gather_objects((self._named(batch.rows), self._named(suspects)))
        rows, bad = ([row for part in parts for row in part] for parts in zip(*of_workers, strict=True))
        what = "gradient" if math.isfinite(metrics["loss"]) else "loss"
        whose = f"rows {_listed(bad)} have vectors that aren't" if bad else f"its rows: {_listed(rows)}"
        text = f"step {batch.step} was skipped, its {what} isn't finite ({whose})"
        self._note("not_finite", batch.step, text, what=what, rows=rows, suspects=bad)
        for count, limit, key in (
            (self.in_a_row, self.config.skip_in_a_row, "faults.skip_in_a_row"),
            (self.skipped, self.config.skip_in_all, "faults.skip_in_all"),
        ):
            if count > limit:
                raise RunError(
                    f"{text}; {count} were skipped{' in a row' if key.endswith('row') else ''}, {key} allows {limit}: "
                    "lower optimizer.lr, mend the rows, or raise that"
                )

    def _is_spike(self, step: int, loss: float) -> bool:
        threshold = spike_threshold(self._losses, self.config.spike)
        self._losses.append(loss)
        if loss <= threshold:
            return False
        self.spikes += 1
        self._note("spike", step, f"the loss of step {step} jumped to {loss:.4g}; above {threshold:.4g} it is told")
        return True

    def _compare_times(self, taken: int) -> None:
        paces = self._pace.compare()
        slow, factor = slowest(paces)
        if self._group.rank == 0:
            self._paces(paces)
        before, self._slow = self._slow, slow.rank if factor > self.config.slow_factor else None
        if self._slow not in (None, before):  # told once, until it is as fast as the others again
            where = f"worker {slow.rank} (process {slow.pid} on {slow.node})"
            why = f"{slow.encode_s:.3g} s encoding, {slow.data_wait_s:.3g} s waiting for data"
            text = f"{where} takes {factor:.1f} times as long as the others: {why} a step, up to step {taken}"
            self._note("slow", taken - 1, text, rank=slow.rank, factor=factor)

    def _named(self, rows: np.ndarray) -> list[str]:
        """`source:row` of each of a batch's `rows`."""
        pairs = [divmod(int(key), 1 << SOURCE_SHIFT) for key in rows]
        return [f"{self._sources[source] if self._sources else source}:{row}" for source, row in pairs]

    def _note(self, kind: str, step: int, text: str, **known: Any) -> None:
        if self._group.rank == 0:
            self._tell({"kind": kind, "step": step, "text": text, **known})


def spike_threshold(losses: Iterable[float], deviations: float | None) -> float:
    """The median of the losses plus so many deviations, each 1.4826 times the median absolute one; inf: too few.

    A normal distribution's standard deviation is 1.4826 times its median absolute deviation; the median isn't moved
    by the spikes themselves. Rousseeuw and Croux, "Alternatives to the median absolute deviation", JASA 1993.
    """
    seen = list(losses)
    if deviations is None or len(seen) < FEWEST:
        return math.inf
    middle = statistics.median(seen)
    spread = 1.4826 * statistics.median(abs(loss - middle) for loss in seen)
    return middle + deviations * max(spread, LEAST_DEVIATION * abs(middle))


def rows_not_finite(batch: Batch, embeddings: Tensor) -> np.ndarray:
    """[n] of the batch's `rows`, those with a vector among embeddings [b+d, ...] or a weight that isn't finite."""
    b = len(batch.queries)
    finite = torch.isfinite(embeddings).flatten(1).all(1).cpu().numpy()
    bad = ~finite[:b]
    bad[batch.owners[~finite[b:]]] = True
    if batch.weights is not None:
        bad |= ~np.isfinite(batch.weights)
    return batch.rows[bad]


def _listed(rows: list[str]) -> str:
    told = ", ".join(rows[:NAMED_ROWS])
    return told + (f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else "")
