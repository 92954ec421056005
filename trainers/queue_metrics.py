"""What is observed of a queue over all workers without moving its rows: sums, ids and scalars travel."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.collectives import Group
from trainers.objectives.keys import Keys

SAMPLED_IDS = 4096
SAMPLED_ROWS = 512


def duplicate_share(ids: Tensor, group: Group, sample: int = SAMPLED_IDS) -> float:
    """The share of rows whose id another row of any worker has too; ids [k] int64 of this worker's rows.

    Exact for up to `sample` rows over all workers. Beyond, the rows are looked at whose id falls into one of
    ceil(rows / sample) residue classes: all that share an id, wherever they are, or none, so that the share is unbiased
    for ids that are hashes (`text_id`), and about `sample` ids travel however many rows there are. Collective.
    """
    rows = int(group.all_reduce(ids.new_tensor(len(ids))))
    chosen = group.all_gather(ids[ids.remainder(max(1, -(-rows // sample))) == 0])
    counts = chosen.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum()) / max(1, len(chosen))


def sampled(vectors: Tensor, keys: Keys, group: Group, sample: int = SAMPLED_ROWS) -> Tensor:
    """[m, D] float64: this worker's part of a sample of at most `sample` rows over all workers, evenly spaced among its
    vectors [n, D]; of token vectors [n, L, D] the mean of the valid ones."""
    count = min(len(vectors), max(1, sample // group.size))
    chosen = torch.arange(count, device=vectors.device) * len(vectors) // max(1, count)
    rows = vectors[chosen].double()
    if rows.ndim == 2:
        return rows
    assert keys.lengths is not None
    lengths = keys.lengths[chosen]
    valid = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return (rows * valid[..., None]).sum(1) / lengths.clamp(min=1)[:, None]


def separability(stored: Tensor, fresh: Tensor, group: Group) -> float:
    """How well stored rows [k, D] can be told from fresh ones [n, D]: the area under the ROC curve of a linear
    classifier on rows that it was not fitted to. 0.5: not at all (or nothing to tell apart), 1: always.

    The classifier is the difference of means over the pooled variance of each dimension (diagonal linear discriminant:
    Bickel & Levina 2004, Bernoulli 10(6)), fitted to every other row and scored on the rest, then the other way round;
    the mean of both areas. It sees a shift of the means: rows that it can't tell apart may differ otherwise. Only sums,
    8 D + 4 numbers, and scores travel. Collective.
    """
    kinds = [[rows[half::2] for half in (0, 1)] for rows in (fresh, stored)]
    moments = group.all_reduce(torch.stack([torch.stack([_moments(half) for half in kind]) for kind in kinds]))
    areas = []
    for fitted, scored in ((0, 1), (1, 0)):
        direction = _direction(moments[:, fitted])
        areas.append(area_under_curve(*(group.all_gather(kind[scored] @ direction) for kind in kinds)))
    return sum(areas) / len(areas)


def area_under_curve(negatives: Tensor, positives: Tensor) -> float:
    """The probability that a positive's score [p] is above a negative's [n], ties half; 0.5 where either is empty."""
    if not len(negatives) or not len(positives):
        return 0.5
    difference = positives[:, None] - negatives[None]
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean())


def _moments(rows: Tensor) -> Tensor:
    """[1 + 2 D]: number of rows, their sum, the sum of their squares."""
    return torch.cat([rows.new_tensor([len(rows)]), rows.sum(0), rows.square().sum(0)])


def _direction(moments: Tensor) -> Tensor:
    """[D] from the moments [2, 1 + 2 D] of fresh and stored rows."""
    counts = moments[:, :1].clamp(min=1)
    sums, squares = moments[:, 1:].chunk(2, 1)
    means = sums / counts
    variance = (squares - counts * means.square()).sum(0) / counts.sum()
    return (means[1] - means[0]) / (variance + variance.mean() * 1e-3).clamp(min=1e-30)
