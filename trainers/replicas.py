"""Whether the workers still hold the same of what all of them should hold: a sum over the bits of each tensor.

A worker whose memory or arithmetic went wrong goes on without an error, and spoils every gradient from then on. What
is held alike depends on the stage: at ZeRO 0 to 2 the weights that are computed with, at ZeRO-3 only the small ones
that stay gathered; the momentum encoder's likewise; at ZeRO-0 masters, moments and averages too; always the counters
of steps and queue rows. A partition that one worker alone holds can't be compared with anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.collectives import Group

if TYPE_CHECKING:
    from trainers.step import ContrastiveStep

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Diverged(RuntimeError):
    """A worker holds something else than the others: its group begins again from the last checkpoint."""


def replicas_of(step: ContrastiveStep) -> dict[str, Tensor]:
    """By name, everything of a step that is the same on every worker."""
    device = step.engine.device
    held = step.engine.replicas() | {"the number of steps": torch.tensor(step.engine.global_steps, device=device)}
    if step.memory:
        held |= {f"the momentum encoder, part {i}": t for i, t in enumerate(step.memory.encoder.replicas())}
        if step.memory.queues is not None:
            queues = step.memory.queues.by_name.items()
            held |= {f"the numbers of queue {name}": torch.tensor(q.numbered, device=device) for name, q in queues}
    return held


@torch.no_grad()
def check_replicas(held: Mapping[str, Tensor], group: Group) -> None:
    """Raises `Diverged` on every worker, with the first tensor that differs and the worker that differs from most.

    One all-reduce of 16 bytes a tensor; one pass over the tensors' memory. Collective.
    """
    if group.size == 1:
        return
    sums = torch.stack([bit_sum(tensor) for tensor in held.values()])
    both = group.all_reduce(torch.cat([sums, ~sums]), "max")  # ~x falls as x grows: its largest is of the smallest
    most, least = both[: len(sums)], ~both[len(sums) :]
    if torch.equal(most, least):
        return
    of_workers = [tuple(found) for found in group.gather_objects(sums.tolist())]
    usual, count = Counter(of_workers).most_common(1)[0]
    others = [rank for rank, found in enumerate(of_workers) if found != usual]
    first = list(held)[int((most != least).nonzero()[0])]
    who = f"worker {', '.join(map(str, others))}" if count > 1 else "every worker"
    raise Diverged(f"{who} holds something else than the others, first {first}")


def bit_sum(tensor: Tensor) -> Tensor:
    """[] int64, the sum over a tensor's elements of their bits read as integers, modulo 2^64."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
