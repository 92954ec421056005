"""The sharded queue holds what a replicated one would: the newest K rows, before and after re-sharding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.schema import UsageError
from tests.twins import ReplicatedQueue, dense_contrastive, random_shares
from trainers.collectives import Group
from trainers.config import ObjectiveConfig, QueueConfig
from trainers.negative_queue import NO_QUERY, NegativeQueue, QueueRows
from trainers.objectives.contrastive import Contrastive

DIM = 3
# documents of each worker, step by step: none, uneven, more than K at once
STEPS = {
    1: [[4], [0], [9], [1], [30], [2], [3]],
    2: [[4, 1], [0, 3], [2, 2], [20, 1], [0, 0], [3, 5], [1, 2]],
    3: [[4, 1, 0], [0, 3, 1], [2, 2, 2], [1, 20, 1], [0, 0, 0], [3, 5, 2], [1, 2, 3]],
    4: [[1, 1, 1, 1], [5, 0, 0, 2], [3, 3, 3, 3]],
}


def _fresh(step: int, rank: int, rows: int):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.arange(rows) + 100 * step + 10_000 * rank
    return torch.randn(rows, DIM, generator=generator), ids, -ids


def _filled(steps, capacity, states=None, first_step=0, dtype="float32"):
    """On a rank: the queue after `steps`, (state, age, live rows at each step)."""
    group = Group()
    queue = NegativeQueue(QueueConfig(rows=capacity, dtype=dtype), DIM, group)
    if states is not None:
        queue.restore(states)
    seen = [_listed(queue)]
    for step, counts in enumerate(steps, first_step):
        queue.enqueue(*_fresh(step, group.rank, counts[group.rank]), step)
        seen.append(_listed(queue))
    return queue.state(), queue.age_steps(first_step + len(steps)), seen


def _listed(queue: NegativeQueue) -> list[tuple]:
    rows = queue.rows()
    columns = rows.document_ids, rows.query_ids, rows.steps
    return [tuple(x) for x in zip(*(c.tolist() for c in (*columns, rows.vectors.float())), strict=True)]


def _replicated(world_steps, capacity) -> list[list[tuple]]:
    twin, seen = ReplicatedQueue(capacity), [[]]
    for step, counts in enumerate(world_steps):
        twin.enqueue([_fresh(step, rank, rows) for rank, rows in enumerate(counts)], step)
        seen.append([(document, query, s, v.tolist()) for v, document, query, s in twin.entries])
    return seen


def _on(gloo, world_size, *arguments):
    return [_filled(*arguments)] if world_size == 1 else gloo(world_size, _filled, *arguments)


@pytest.mark.parametrize("capacity", [1, 7, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_together_hold_exactly_the_newest_rows(gloo, world_size, capacity):
    ranks = _on(gloo, world_size, STEPS[world_size], capacity)
    expected = _replicated(STEPS[world_size], capacity)
    for step, whole in enumerate(expected):
        assert sorted(row for *_, seen in ranks for row in seen[step]) == sorted(whole)
    last = len(STEPS[world_size])
    age = sum(last - step for _, _, step, _ in expected[-1]) / len(expected[-1])
    assert [found for _, found, _ in ranks] == pytest.approx([age] * world_size)


def test_resharding_4_2_3_1_4_keeps_the_newest_rows(gloo):
    capacity, done, states = 11, [], None
    for world_size in (4, 2, 3, 1, 4):
        steps = STEPS[world_size][:3]
        ranks = _on(gloo, world_size, steps, capacity, states, len(done))
        if done:
            held = [len(seen[0]) for *_, seen in ranks]
            assert sum(held) == min(capacity, sum(map(sum, done)))
            assert max(held) - min(held) <= 1
        done += steps
        states = [state for state, *_ in ranks]
        numbers = sorted(torch.cat([state["sequence"] for state in states]).tolist())
        total = sum(map(sum, done))
        assert numbers == list(range(max(0, total - capacity), total))
        whole = _replicated(done, capacity)[-1]
        assert sorted(row for *_, seen in ranks for row in seen[-1]) == sorted(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_number_of_workers_takes_up_the_same_rows_in_the_same_order(gloo, dtype):
    steps, capacity = STEPS[2], 9
    through = _on(gloo, 2, steps, capacity, None, 0, dtype)
    half = _on(gloo, 2, steps[:4], capacity, None, 0, dtype)
    resumed = _on(gloo, 2, steps[4:], capacity, [state for state, *_ in half], 4, dtype)
    for (state, *_), (again, *_) in zip(through, resumed, strict=True):
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)
        assert all(x.is_contiguous() and x.device.type == "cpu" for x in state.values())
        assert state["vectors"].dtype == getattr(torch, dtype)


def test_a_smaller_queue_takes_up_the_newest_of_a_larger_one():
    state, *_ = _filled([[20]], 20)
    queue = NegativeQueue(QueueConfig(rows=6), DIM, Group())
    queue.restore([state])
    assert queue.state()["sequence"].tolist() == list(range(14, 20))


@settings(max_examples=50, deadline=None)
@given(capacity=st.integers(0, 20), counts=st.lists(st.integers(0, 25), max_size=20))
def test_any_sequence_of_sizes_leaves_the_newest_rows_in_order(capacity, counts):
    *_, seen = _filled([[n] for n in counts], capacity)
    assert seen == _replicated([[n] for n in counts], capacity)


def test_the_buffer_stays_within_a_quarter_of_what_it_holds():
    queue = NegativeQueue(QueueConfig(rows=800), DIM, Group())
    for step in range(200):
        queue.enqueue(*_fresh(step, 0, 16), step)
    assert len(queue) == 800
    assert queue.rows().vectors.untyped_storage().nbytes() <= 1.25 * 800 * DIM * 4


def _loss_with_queue(shares, rounds):
    """On a rank: enqueue every round's documents, then the loss of the last round beside the queue."""
    group, config = Group(), ObjectiveConfig(temperature=0.2, tile=4)
    queue = NegativeQueue(QueueConfig(rows=9), DIM, group)
    for step, round_shares in enumerate(rounds):
        share = round_shares[group.rank]
        answers = torch.full((len(share.documents),), NO_QUERY)
        answers[: len(share.queries)] = share.ids.query_ids
        queue.enqueue(share.documents.float(), share.ids.document_ids, answers, step)
    share = shares[group.rank].to(torch.float32)
    queries, total = share.queries.requires_grad_(), sum(len(s.queries) for s in shares)
    result = Contrastive(config, group)(queries, share.documents, share.ids, total, queue.rows())
    result.loss.backward()
    return result.metrics["loss"], queries.grad


def test_the_loss_beside_a_sharded_queue_equals_that_beside_a_replicated_one(gloo):
    counts = [(3, 4), (2, 2)]
    shares, rounds = random_shares(0, counts, DIM), [random_shares(seed, counts, DIM) for seed in (1, 2, 3)]
    twin = ReplicatedQueue(9)
    for step, round_shares in enumerate(rounds):
        answers = [
            torch.cat([s.ids.query_ids, torch.full((d - b,), NO_QUERY)])
            for s, (b, d) in zip(round_shares, counts, strict=True)
        ]
        triples = [(s.documents, s.ids.document_ids, a) for s, a in zip(round_shares, answers, strict=True)]
        twin.enqueue(triples, step)
    vectors, documents, queries, steps = zip(*twin.entries, strict=True)
    rows = QueueRows(torch.stack(vectors), *(torch.tensor(x) for x in (documents, queries, steps)))
    expected = dense_contrastive(shares, ObjectiveConfig(temperature=0.2), rows)
    for rank, (loss, gradient) in enumerate(gloo(2, _loss_with_queue, shares, rounds)):
        assert loss == pytest.approx(expected.loss, rel=1e-5)
        torch.testing.assert_close(gradient.double(), expected.query_gradients[rank], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_said_with_both_values():
    queue = NegativeQueue(QueueConfig(rows=4), DIM, Group())
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"vectors are \[2, 5\], the queue holds \[d, 3\]"):
        queue.enqueue(torch.zeros(2, 5), ids, ids, 0)
    with pytest.raises(ValueError, match=r"query_ids \[1\] for 2 vectors"):
        queue.enqueue(torch.zeros(2, DIM), ids, ids[:1], 0)
    wider = NegativeQueue(QueueConfig(rows=4), DIM + 1, Group())
    with pytest.raises(UsageError, match="rows have 4 dimensions and the model gives 3"):
        queue.restore([wider.state()])
    later = queue.state() | {"next": torch.tensor([7])}
    with pytest.raises(ValueError, match=r"states of different moments, next = \[0, 7\]"):
        queue.restore([queue.state(), later])
