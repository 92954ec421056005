"""What a contrastive loss says of a batch beside its value: sums that add up over workers, and the metrics of them."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.objectives.embedded import Embedded, wide
from trainers.objectives.nats import Side
from trainers.objectives.sharded_softmax import Reductions


@torch.no_grad()
def observed(
    embedded: Embedded, side: Side, there: Reductions, temperature: float | Tensor, scale: float, tile: int
) -> Tensor:
    """[6] float64, this worker's sums: queries, those that have negatives, correct ones, queues' share of the
    denominator, squared distance of query and positive, exp(-2 squared distance) to the other queries.

    side   the queries' own direction
    there  what was reduced of it, and by block; `scale` is that of its first denominator
    tile   queries compared at once
    """
    compared = (there.rows.denominators[0] != -torch.inf) & side.aimed
    positive = side.pairs / temperature
    correct = (positive > there.rows.hardest)[compared].sum()
    stored = torch.tensor([not block.fresh for block in there.exchange.blocks], device=positive.device)
    stored[0] = False  # the batch's own documents, by whichever encoder
    queued = torch.where(stored[:, None], there.parts, -torch.inf).logsumexp(0)
    denominator = torch.logaddexp(there.rows.denominators[0], positive * scale)
    hardness = (queued - denominator).exp()[compared].sum()
    distance = hardness.new_zeros(())
    if embedded.pooled:
        distance = (wide(embedded.queries) - wide(embedded.positives)).square().sum()
    sums = [
        correct.new_tensor(len(positive)),
        compared.sum(),
        correct,
        hardness,
        distance,
        _closeness(embedded, there, tile),
    ]
    return torch.stack([x.double() for x in sums])


def metrics_of(sums: Tensor, queries: int) -> dict[str, float]:
    """Of a global batch, from all workers' sums but the first, [5]."""
    compared, correct, hardness, distance, closeness = sums.tolist()
    pairs = queries * (queries - 1)
    return {
        "accuracy": correct / max(1, compared),
        "alignment": distance / max(1, queries),
        "uniformity": float(torch.tensor(closeness / pairs).log()) if pairs else 0.0,
        "queue_hardness": hardness / max(1, compared),
        "nothing_to_compare": queries - compared,
    }


def _closeness(embedded: Embedded, there: Reductions, tile: int) -> Tensor:
    """Sum over this worker's queries x and all others y of exp(-2 |x - y|^2) = exp(4 (x.y - 1))."""
    everyone = there.exchange.queries
    own = everyone[there.exchange.own]
    with_self = torch.zeros((), dtype=torch.float64, device=own.device)
    if not embedded.pooled:
        return with_self
    for some in everyone.split(tile):
        with_self += (own @ some.T).sub_(1).mul_(4).exp_().sum()
    return with_self - (own.square().sum(1) - 1).mul_(4).exp_().sum()
