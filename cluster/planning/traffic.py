"""The collectives of one step: what each moves, how often, and how many bytes that puts on a worker's wire.

They are those that trainers/step.py, trainers/loop.py and DeepSpeed 0.19, as trainers/engine.py sets it up, really
make; tests count both. S bytes of a whole result, T trained elements, P all, c bytes of one that is computed with:

    agreement   all-gather      4 numbers of each worker
    queries     all-gather      B (4 D + 8 a key column)
    statistics  all-reduce      B numbers: a maximum, then two sums; a few totals
    upstream    all-gather      B numbers, dL/d(log-sum-exp)
    gradient of queries         reduce-scatter, 4 B D
    gradients   all-reduce      4 T, bucket by bucket; at ZeRO-1 and 2 too, where each worker keeps its part alone.
                reduce-scatter  4 T at ZeRO-3
    weights     all-gather      c T at ZeRO-1 and 2, after the step; at ZeRO-3 c P for every pass over the model
    average     all-gather      c T at ZeRO-1 and 2, the momentum encoder's; at ZeRO-3 of what stays gathered

None of them is all-to-one: every worker sends and receives as much as every other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cluster.planning.memory import BUCKET_ELEMENTS, stays_gathered
from cluster.planning.workload import FP32, KEY_BYTES, Workload

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Part = Literal["exchange", "gradients", "weights", "average", "report"]

DOUBLE = 8
PREFETCHED_ELEMENTS = 50_000_000
"""ZeRO-3 fetches so many elements ahead in one gather (DeepSpeed's stage3_prefetch_bucket_size, at its default)."""


@dataclass(frozen=True)
class Collective:
    """`times` collectives of a kind, of `size` bytes of the whole result each."""

    part: Part
    kind: Kind
    size: float
    times: int = 1

    def wire_bytes(self, gpus: int) -> float:
        """What one worker sends, as a ring sends it (trainers/collectives.py)."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return self.times * rounds * self.size * (gpus - 1) / gpus


def collectives(of: Workload) -> list[Collective]:
    """Of one step, in their order; none in a world of one."""
    if of.gpus == 1:
        return []
    return [*exchange(of), *gradients(of), *weights(of), *average(of), *report()]


def exchange(of: Workload) -> list[Collective]:
    """Whatever the queue's rows and the hard negatives; 2 B D and a few B."""
    b, numbers = of.batch, FP32 * of.batch
    header = KEY_BYTES * of.query_keys
    made = [
        Collective("exchange", "all_gather", 4 * KEY_BYTES * of.gpus),
        Collective("exchange", "all_gather", b * (FP32 * of.dim + header)),
        Collective("exchange", "all_reduce", numbers),
        Collective("exchange", "all_reduce", 2 * numbers),
        Collective("exchange", "all_reduce", 10 * DOUBLE),
        Collective("exchange", "all_gather", numbers),
        Collective("exchange", "reduce_scatter", numbers * of.dim),
    ]
    return made + ([Collective("exchange", "all_reduce", 2 * KEY_BYTES)] if of.queue_rows else [])


def gradients(of: Workload) -> list[Collective]:
    """Whole gradients once a step, or with each chunk; and from ZeRO-1 on a few single numbers, the norm and
    whether it is finite."""
    kind: Kind = "reduce_scatter" if of.zero_stage == 3 else "all_reduce"
    passes, buckets = of.chunks if of.per_chunk else 1, -(-of.trained // BUCKET_ELEMENTS)
    made = Collective("gradients", kind, FP32 * of.trained / buckets, buckets * passes)
    flags = [Collective("gradients", "all_reduce", FP32, 3 if of.element_bytes < FP32 else 2)] if of.zero_stage else []
    return [made, *flags]


def weights(of: Workload) -> list[Collective]:
    """After the step at ZeRO-1 and 2. At ZeRO-3, as many at a time as are fetched ahead, for each pass over the model:
    a chunk's forward, again where it is encoded twice, its backward, and the momentum encoder's forward over the
    documents; and once what stays gathered."""
    if of.zero_stage in (1, 2):
        return [Collective("weights", "all_gather", of.element_bytes * part) for part in _groups(of)]
    if of.zero_stage == 0:
        return []
    passes = of.chunks * (3 if of.cached else 2) + (of.chunks if of.momentum else 0)
    kept = stays_gathered(of)
    fetched = of.parameters - kept
    times = max(1, math.ceil(fetched / PREFETCHED_ELEMENTS))
    once = Collective("weights", "all_gather", of.element_bytes * kept)
    return [once, Collective("weights", "all_gather", of.element_bytes * fetched / times, passes * times)]


def average(of: Workload) -> list[Collective]:
    if not of.momentum or of.zero_stage == 0:
        return []
    parts = _groups(of) if of.zero_stage < 3 else [min(of.trained, stays_gathered(of))]
    return [Collective("average", "all_gather", of.element_bytes * part) for part in parts]


def _groups(of: Workload) -> list[float]:
    """Elements of the optimizer's groups: matrices that decay, and all else."""
    if of.adapter_rank is not None:
        return [of.trained]
    matrices = of.shape.layers * sum(inputs * outputs for inputs, outputs in of.shape.matrices.values())
    return [matrices, of.trained - matrices]


def report() -> list[Collective]:
    """Counters that are summed, and times of which the largest counts."""
    return [Collective("report", "all_reduce", 4 * DOUBLE), Collective("report", "all_reduce", 3 * DOUBLE)]


def wire_bytes(of: Workload) -> dict[str, float]:
    """Bytes that a worker sends in a step, by part."""
    total: dict[str, float] = {}
    for one in collectives(of):
        total[one.part] = total.get(one.part, 0.0) + one.wire_bytes(of.gpus)
    return total


def messages(of: Workload) -> int:
    """Collectives of a step: each is a round of waiting."""
    return sum(one.times for one in collectives(of))
