"""Bytes that a step takes on one GPU, part by part.

P elements of the model, T of them trained, W workers, c bytes of an element that is computed with. What ZeRO shards:
Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1; what else there is comes from how this engine sets DeepSpeed up
(trainers/engine.py, trainers/reduction.py, trainers/ema.py):

    weights     c P                  ZeRO-3: c P/W, and beside it what is gathered at a time
    masters     4 T/W                fp32; ZeRO-0: 4 T, in fp32 the weights themselves
    moments     8 T/W                ZeRO-0: 8 T
    gradients   4 T                  whole until the last chunk; reduced beside a bucket and, from ZeRO-1 on, 4 T/W
                4 T/W                with `engine.reduction: per_chunk`, and a bucket
    average     4 T/W + c T          the momentum encoder: its average, and what stands under the model in its forward;
                                     ZeRO-3: 4 T/W + c T/W
    queue       K/W rows             a vector and the columns that masks compare
    exchange    3 x 4 B D + tiles    the queries of all workers, their gradient, the queue's part of it

Padding to equal parts, the CUDA context, libraries' workspaces and what the allocator loses to fragments are not in it:
`RESERVE` is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from cluster.planning.activations import activation_bytes, backward_bytes
from cluster.planning.workload import FP32, KEY_BYTES, Workload

GIB = 1 << 30
BUCKET_ELEMENTS = 200_000_000
"""As in trainers/engine.py."""
LIVE_ELEMENTS = 1_000_000_000
"""ZeRO-3 gathers so many elements at a time (DeepSpeed's stage3_max_live_parameters, at its default)."""
PERSISTENT_ELEMENTS, GATHERED_SHARE = 100_000, 0.05
"""Weights of at most so many elements stay gathered (stage3_param_persistence_threshold, at its default), and of an
adapter the smallest, up to a share of the model (trainers/engine.py)."""
WEIGHTS_BYTES = 1 << 28
"""As in trainers/objectives/kernels.py."""
RESERVE = 0.08
"""Share of a GPU's memory that is left alone: the CUDA context and NCCL's buffers, 2 to 3 GiB, and fragments."""
ROOM = 65 / 64
"""A queue reserves a sixty-fourth more places than its share (trainers/negative_queue.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `host` is what offload keeps in the memory of its node instead.

    Gradients and activations are there together, then gradients and what reduces them, and before both the exchange
    and what is kept of the forward pass: the largest of the three sums counts.
    """

    weights: float
    gathered: float
    masters: float
    moments: float
    gradients: float
    reduction: float
    average: float
    queue: float
    exchange: float
    activations: float
    kept_for_loss: float
    host: float

    @property
    def held(self) -> float:
        """From step to step."""
        return self.weights + self.masters + self.moments + self.average + self.queue

    @property
    def peak(self) -> float:
        walked_back, reduced = self.gradients + self.activations, self.gradients + self.reduction
        return self.held + self.gathered + max(walked_back, reduced, self.exchange + self.kept_for_loss)

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"held": self.held, "peak": self.peak}


def memory_of(of: Workload) -> Memory:
    masters, moments = _masters(of), 2 * FP32 * of.trained / _shards(of)
    tokens = min(of.budget_tokens, of.local_tokens)
    graphs = activation_bytes(of)
    return Memory(
        weights=of.element_bytes * of.parameters / (of.gpus if of.zero_stage == 3 else 1),
        gathered=_gathered(of),
        masters=0.0 if of.offload else masters,
        moments=0.0 if of.offload else moments,
        gradients=_gradients(of),
        reduction=_reduction(of),
        average=_average(of),
        queue=queue_bytes(of),
        exchange=exchange_bytes(of),
        activations=graphs + backward_bytes(of, tokens),
        kept_for_loss=0.0 if of.cached else graphs,
        host=(masters + moments + FP32 * of.trained / of.gpus) if of.offload else 0.0,
    )


def _shards(of: Workload) -> int:
    return of.gpus if of.zero_stage else 1


def _gathered(of: Workload) -> float:
    if of.zero_stage < 3:
        return 0.0
    kept = stays_gathered(of)
    return of.element_bytes * (kept + min(of.parameters - kept, LIVE_ELEMENTS))


def stays_gathered(of: Workload) -> float:
    """Elements that ZeRO-3 gathers once a step."""
    small = of.shape.elements_up_to(PERSISTENT_ELEMENTS)
    return small + (0.0 if of.adapter_rank is None else min(of.trained, GATHERED_SHARE * of.parameters))


def _masters(of: Workload) -> float:
    if of.zero_stage == 0 and of.element_bytes == FP32:
        return 0.0
    return FP32 * of.trained / _shards(of)


def _gradients(of: Workload) -> float:
    """While chunks are walked back."""
    return _share(of) + _bucket(of) if of.per_chunk else FP32 * of.trained


def _reduction(of: Workload) -> float:
    """Beside whole gradients when they are reduced."""
    return 0.0 if of.per_chunk else _share(of) + _bucket(of)


def _share(of: Workload) -> float:
    return FP32 * of.trained / of.gpus if of.zero_stage and not of.offload else 0.0


def _bucket(of: Workload) -> float:
    return FP32 * min(of.trained, BUCKET_ELEMENTS)


def _average(of: Workload) -> float:
    if not of.momentum:
        return 0.0
    stands = of.element_bytes * of.trained / (of.gpus if of.zero_stage == 3 else 1)
    return FP32 * of.trained / _shards(of) + stands


def queue_bytes(of: Workload) -> float:
    """Of K/W rows."""
    return of.queue_rows / of.gpus * ROOM * (of.queue_bytes * of.dim + KEY_BYTES * of.queue_keys)


def exchange_bytes(of: Workload) -> float:
    """All workers' queries, what the queue adds to their gradient, and their gradient. Beside them on a GPU one chunk
    of weights and, of a queue in fp32, the copy that a run in bf16 multiplies (trainers/objectives/walk.py); on a CPU a
    tile's logits with a copy for the other direction and one in work."""
    queries = (3 if of.queue_rows else 2) * FP32 * of.batch * of.dim
    rows = of.queue_rows / of.gpus
    if of.tile:
        return queries + 3 * FP32 * of.batch * min(of.tile, max(of.local * of.texts.documents, rows))
    copied = of.queue_bytes > of.element_bytes
    return queries + WEIGHTS_BYTES + (of.element_bytes * rows * of.dim if copied else 0.0)


def largest_budget(of: Workload, memory_bytes: float, reserve: float = RESERVE) -> int:
    """The most tokens of a chunk that fit beside everything else, a multiple of 256; 0 where none do."""

    def fits(tokens: int) -> bool:
        return memory_of(replace(of, budget_tokens=tokens, cached=True)).peak <= memory_bytes * (1 - reserve)

    low, high = 0, max(256, int(of.local_tokens) // 256 * 256 + 256)
    while high - low > 256:
        middle = (low + high) // 512 * 256
        low, high = (middle, high) if fits(middle) else (low, middle)
    return high if fits(high) else low
