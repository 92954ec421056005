"""Every collective of a step, and the one place where a gradient is scaled by the number of workers.

The algebra. The loss is a mean over the B queries of the global batch, L = (1/B) sum_i l_i. The objective
returns on each worker its own share of that sum, L_r = (1/B) sum_{i on r} l_i, so L = sum_r L_r, and its
backward leaves in the worker's embeddings the gradient of the *whole* L (the exchange has added every other
worker's share). A parameter w is reached by each worker through its own texts only:

    dL/dw = sum_r  dL/dE_r . dE_r/dw

that is, the sum over workers of what each one's backward gives. DeepSpeed (like DDP) divides that sum by W.
So the gradient handed to the engine is multiplied by W, here (`engine_gradient_scale`) and nowhere else.

Bytes. `Group.traffic` counts what this worker puts on the wire, as a ring algorithm sends it, whatever the
backend really does, so that figures compare across backends. With W workers, S bytes of a whole result and
S_r bytes of worker r's part:

    all_gather      (W-1) max_r S_r     every block but one passes through; blocks are padded to the longest
    reduce_scatter  S - S_r             a partial sum of every block but the worker's own
    all_reduce      2 S (W-1) / W       a reduce-scatter, then an all-gather, of equal blocks
    broadcast       S (W-1)             counted on the worker that sends
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def engine_gradient_scale(world_size: int) -> float:
    """What dL/dE_r is multiplied by before an engine that *averages* over `world_size` workers sees it."""
    return float(world_size)


class Group:
    """The workers of a run: the default process group where there is one, else a world of one.

    Every method but the properties is collective: all workers call it, in the same order. Nothing is done in
    place; in a world of one the argument itself comes back.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self._group = process_group
        self.rank: int = 0 if alone else dist.get_rank(process_group)
        self.size: int = 1 if alone else dist.get_world_size(process_group)
        self._traffic: Counter[str] = Counter()
        self._messages: Counter[str] = Counter()

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes this worker put on the wire per collective since `reset_traffic` (formulas above)."""
        return dict(self._traffic)

    @property
    def messages(self) -> dict[str, int]:
        """How many of each collective this worker took part in since `reset_traffic`: each costs a round of waiting."""
        return dict(self._messages)

    def reset_traffic(self) -> None:
        self._traffic.clear()
        self._messages.clear()

    def _sent(self, collective: str, number_of_bytes: int) -> None:
        self._traffic[collective] += number_of_bytes
        self._messages[collective] += 1

    def sizes(self, rows: int, device: torch.device | str = "cpu") -> list[int]:
        """The number of rows of every worker, in rank order; `device` is one the backend can send from."""
        return self.all_gather(torch.tensor([rows], device=device), [1] * self.size).tolist()

    def all_gather(self, x: Tensor, sizes: list[int] | None = None) -> Tensor:
        """x [n, ...] of every worker, end to end in rank order: [sum n, ...].

        `sizes` gives every worker's n where the caller knows them (else they are gathered first). Uneven
        blocks are padded to the longest, since gloo refuses anything else.
        """
        if self.size == 1:
            return x
        sizes = self.sizes(len(x), x.device) if sizes is None else self._checked(sizes, len(x), "all_gather")
        longest = max(sizes)
        if longest == 0:
            return x
        block = x.contiguous()
        if len(x) < longest:
            block = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        gathered = x.new_empty(self.size * longest, *x.shape[1:])
        dist.all_gather(list(gathered.split(longest)), block, group=self._group)
        self._sent("all_gather", (self.size - 1) * _bytes(block))
        if min(sizes) == longest:
            return gathered
        blocks = gathered.split(longest)
        return torch.cat([rows[:n] for rows, n in zip(blocks, sizes, strict=True)])

    def all_gather_together(self, columns: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
        """Each of `columns` [n, ...], of any types, as `all_gather` gives it: all in one message."""
        if self.size == 1:
            return list(columns)
        widths = [math.prod(x.shape[1:]) * x.element_size() for x in columns]
        rows = [x.contiguous().view(torch.uint8).view(len(x), w) for x, w in zip(columns, widths, strict=True)]
        gathered = self.all_gather(torch.cat(rows, 1), sizes).split(widths, 1)
        return [
            of_all.clone(memory_format=torch.contiguous_format).view(x.dtype).view(len(of_all), *x.shape[1:])
            for of_all, x in zip(gathered, columns, strict=True)
        ]

    def reduce_scatter(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The sum over workers of x [sum sizes, ...]; worker r keeps its block of it: [sizes[r], ...]."""
        if self.size == 1:
            return x
        self._checked(sizes, sizes[self.rank], "reduce_scatter")
        if sum(sizes) != len(x):
            raise ValueError(f"reduce_scatter: sizes add up to {sum(sizes)} rows, x has {len(x)} on axis 0")
        if len(x) == 0:
            return x
        own = x.new_empty(sizes[self.rank], *x.shape[1:])
        dist.reduce_scatter(own, list(x.contiguous().split(sizes)), group=self._group)
        self._sent("reduce_scatter", _bytes(x) - _bytes(own))
        return own

    def all_reduce(self, x: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
        """The element-wise sum, maximum or minimum over workers of x, of equal shape everywhere."""
        if self.size == 1 or x.numel() == 0:
            return x
        reduced = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, op=_OPERATIONS[op], group=self._group)
        self._sent("all_reduce", -(-2 * (self.size - 1) * _bytes(x) // self.size))
        return reduced

    def broadcast_object(self, value: Any) -> Any:
        """What worker 0 passed as `value`, on every worker. It must pickle; for small decisions only."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        if self.rank == 0:
            self._sent("broadcast", (self.size - 1) * len(pickle.dumps(value)))
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's `value`, in rank order, on every worker. They must pickle; small and seldom only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        self._sent("all_gather", (self.size - 1) * max(len(pickle.dumps(v)) for v in values))
        return values

    def barrier(self) -> None:
        """Returns once every worker has called it."""
        if self.size > 1:
            dist.barrier(group=self._group)

    def _checked(self, sizes: list[int], rows: int, collective: str) -> list[int]:
        if len(sizes) != self.size:
            raise ValueError(f"{collective}: {len(sizes)} sizes for {self.size} workers")
        if sizes[self.rank] != rows:
            raise ValueError(f"{collective}: sizes[{self.rank}] is {sizes[self.rank]}, x has {rows} on axis 0")
        return sizes


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
