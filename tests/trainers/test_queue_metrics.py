"""What is observed of queues over all workers is what one process would see."""

from collections import Counter

import pytest
import torch

from tests.trainers.queues import (
    DIM,
    fresh_rows,
    sides_of,
)
from trainers.collectives import Group
from trainers.config import QueueConfig
from trainers.negative_queue import Queues
from trainers.objectives.keys import Keys
from trainers.queue_metrics import area_under_curve, duplicate_share, sampled, separability


def _observed(shift: float):
    """On a rank: metrics of queues with equal texts, whose rows are shifted in the first dimension, and those rows."""
    group = Group()
    config = QueueConfig(rows=60, observe_every_steps=3, others=[{"name": "queries", "rows": 40}])
    queues = Queues(config, DIM, group)
    fresh = {side: fresh_rows(9, group.rank + 7, 15 + group.rank) for side in ("documents", "queries")}
    empty = queues.observe(fresh, 0)
    for step in range(3):
        sides = sides_of(step, group.rank, 12)
        for vectors, keys in sides.values():
            vectors[:, 0] += shift
            keys.document_ids[::3] = 1000 * step
            keys.query_ids[:2] = 5
        queues.enqueue(sides, step)
    rows = queues.rows(5)
    gathered = {name: (r.vectors, r.keys, r.steps) for name, r in rows.items()}
    return empty, queues.observe(fresh, 6), queues.observe(fresh, 5), gathered, fresh


def _area(stored: list[torch.Tensor], fresh: list[torch.Tensor]) -> float:
    """The definition, in one process: every worker's even rows against the odd ones and the other way round."""

    def half(kind: list[torch.Tensor], parity: int) -> torch.Tensor:
        return torch.cat([rows[parity::2] for rows in kind]).double()

    areas = []
    for parity in (0, 1):
        a, b = half(fresh, parity), half(stored, parity)
        pooled = torch.cat([a - a.mean(0), b - b.mean(0)]).square().mean(0)
        direction = (b.mean(0) - a.mean(0)) / (pooled + pooled.mean() * 1e-3)
        low, high = half(fresh, 1 - parity) @ direction, half(stored, 1 - parity) @ direction
        areas.append(sum((y > x) + 0.5 * (y == x) for x in low for y in high).item() / (len(low) * len(high)))
    return sum(areas) / 2


@pytest.mark.parametrize("shift", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("world_size", [1, 2])
def test_metrics_of_all_workers_rows_are_those_of_one_process(gloo, world_size, shift):
    ranks = [_observed(shift)] if world_size == 1 else gloo(world_size, _observed, shift)
    empties, found, rarely, gathered, fresh = zip(*ranks, strict=True)
    nothing = {"rows": 0.0, "age_steps": 0.0, "duplicates": 0.0, "separability": 0.5}
    for empty in empties:
        assert empty == {prefix + name: v for prefix in ("queue_", "queue_queries_") for name, v in nothing.items()}
    assert all(metrics == found[0] for metrics in found)
    assert set(rarely[0]) == {
        prefix + name for prefix in ("queue_", "queue_queries_") for name in ("rows", "age_steps")
    }
    for name, prefix, column in (
        ("documents", "queue_", "document_ids"),
        ("queries", "queue_queries_", "query_ids"),
    ):
        vectors, keys, steps = zip(*(rows[name] for rows in gathered), strict=True)
        ids = Counter(torch.cat([getattr(k, column) for k in keys]).tolist())
        of_fresh = [f[name][0] for f in fresh]
        assert found[0] == found[0] | {
            f"{prefix}rows": float(sum(map(len, vectors))),
            f"{prefix}age_steps": pytest.approx((6 - torch.cat(steps).double()).mean().item()),
            f"{prefix}duplicates": pytest.approx(sum(n for n in ids.values() if n > 1) / ids.total()),
            f"{prefix}separability": pytest.approx(_area(list(vectors), of_fresh), abs=1e-9),
        }
        if shift == 20.0:
            assert found[0][f"{prefix}separability"] == 1.0


def test_rows_of_one_distribution_cannot_be_told_apart_and_a_small_shift_can():
    group, generator = Group(), torch.Generator().manual_seed(0)
    stored, fresh = (torch.randn(512, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    assert separability(stored, fresh, group) == pytest.approx(0.5, abs=0.06)
    stored[:, :8] += 0.5
    assert separability(stored, fresh, group) > 0.75
    assert area_under_curve(torch.zeros(3), torch.zeros(2)) == 0.5


def test_the_sample_is_spread_evenly_and_token_vectors_count_by_their_valid_mean():
    vectors = torch.arange(1000.0)[:, None].expand(1000, DIM)
    keys = Keys(torch.arange(1000), torch.arange(1000))
    assert sampled(vectors, keys, Group(), 4)[:, 0].tolist() == [0, 250, 500, 750]
    assert sampled(vectors[:0], keys[:0], Group(), 4).shape == (0, DIM)
    tokens = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [99.0], [99.0]]])
    lengths = Keys(torch.arange(2), torch.arange(2), lengths=torch.tensor([2, 1]))
    assert sampled(tokens, lengths, Group()).tolist() == [[2.0], [5.0]]


def test_the_share_of_duplicates_is_estimated_from_whole_groups_of_equal_ids():
    generator = torch.Generator().manual_seed(0)
    hashes = torch.randint(-(2**62), 2**62, (30_000,), generator=generator)
    ids = torch.cat([hashes, hashes[:5000], hashes[:5000]])
    exact = duplicate_share(ids, Group(), sample=len(ids))
    assert exact == pytest.approx(15_000 / 40_000)
    assert duplicate_share(ids, Group(), sample=4000) == pytest.approx(exact, abs=0.03)
