"""The sharded queues hold what replicated ones would, the newest rows, and the loss beside them is the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.trainers.queues import (
    DIM,
    KINDS,
    STEPS,
    Replicated,
    assert_equal,
    enqueue,
    fresh_rows,
    on_ranks,
    run,
)
from tests.twins import dense_contrastive, in_type, random_shares
from trainers.collectives import Group
from trainers.config import QueueConfig
from trainers.negative_queue import NegativeQueue, QueueRows, Queues
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.keys import Keys
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.row_store import RowStore


@pytest.mark.parametrize("capacity", [1, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_together_hold_exactly_the_newest_rows(gloo, world_size, kind, capacity):
    section = {"rows": capacity, **KINDS[kind], "others": [{"name": "queries", "rows": 5}]}
    ranks = on_ranks(gloo, world_size, section, STEPS[world_size])
    twins = {name: Replicated(config) for name, config in QueueConfig(**section).by_name.items()}
    assert_equal(ranks, twins, 0, 0)
    for step, counts in enumerate(STEPS[world_size]):
        enqueue(twins, counts, step)
        assert_equal(ranks, twins, step + 1, step + 1)


@settings(max_examples=50)
@given(
    capacity=st.integers(1, 20),
    counts=st.lists(st.integers(0, 25), max_size=20),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_any_sequence_of_sizes_leaves_the_newest_rows(capacity, counts, kind):
    section = {"rows": capacity, **KINDS[kind]}
    twins, ranks = {"documents": Replicated(QueueConfig(**section))}, [run(section, [[n] for n in counts])]
    for step, n in enumerate(counts):
        enqueue(twins, [n], step)
        assert_equal(ranks, twins, step + 1, step + 1)


@settings(max_examples=100)
@given(changes=st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 20)))), room=st.integers(0, 9))
def test_a_store_holds_what_entered_and_has_not_left(changes, room):
    store, there, entered = RowStore(room), set(), 0
    for entering, leaving in changes:
        gone = sorted({place for place in leaving if place < len(store)})
        for place in gone:
            there.remove(store.columns()["number"][place].item())
        fresh = torch.arange(entered, entered + entering)
        store.replace(torch.tensor(gone, dtype=torch.int64), {"number": fresh, "twice": 2.0 * fresh[:, None]})
        there |= set(fresh.tolist())
        entered += entering
        columns = store.columns()
        assert sorted(columns["number"].tolist()) == sorted(there)
        assert torch.equal(columns["twice"][:, 0], 2.0 * columns["number"])
        assert len(store) == len(there)


def test_a_queue_takes_no_more_than_a_twelfth_above_its_rows():
    for world_rows, batch in ((800, 16), (800, 48), (801, 7)):
        queue = NegativeQueue(QueueConfig(rows=world_rows), DIM, Group())
        for step in range(2 * world_rows // batch):
            queue.enqueue(*fresh_rows(step, 0, batch), step)
        row = DIM * 4 + 8 * 7  # vectors; five keys, the step and the number
        assert len(queue) == world_rows
        assert world_rows * row <= queue.nbytes <= world_rows * row * 13 / 12


def _loss_with_queue(shares, rounds, config):
    """On a rank: enqueue every round's documents, then the loss of the last round beside the queue."""
    group = Group()
    queues = Queues(config, DIM, group)
    for step, round_shares in enumerate(rounds):
        share = round_shares[group.rank]
        queues.enqueue({"documents": (share.documents.float(), share.document_keys)}, step)
    share = in_type(shares[group.rank], torch.float32)
    share.queries.requires_grad_()
    share = replace(share, queues=queues.rows(len(rounds)))
    result = Contrastive(ContrastiveSection(temperature=0.2, tile=4, only_same=["tasks"]), group)(share)
    result.loss.backward()
    return result.metrics["loss"], share.queries.grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_beside_a_sharded_queue_equals_that_beside_a_replicated_one(gloo, kind):
    counts, config = [(3, 4), (2, 2)], QueueConfig(rows=4, **KINDS[kind])
    shares, rounds = random_shares(0, counts, DIM), [random_shares(seed, counts, DIM) for seed in (1, 2, 3)]
    twin, vectors, keys = Replicated(config), [], []
    for step, round_shares in enumerate(rounds):
        twin.enqueue([(s.documents, s.document_keys) for s in round_shares], step)
        vectors += [s.documents for s in round_shares]
        keys += [s.document_keys for s in round_shares]
    numbers = torch.tensor([row[0] for row in twin.given(3)])
    columns = {name: torch.cat([k.columns()[name] for k in keys])[numbers] for name in keys[0].columns()}
    rows = QueueRows(torch.cat(vectors)[numbers], Keys(**columns), torch.zeros_like(numbers), numbers)
    section = ContrastiveSection(temperature=0.2, only_same=["tasks"])
    expected = dense_contrastive(shares, section, {"documents": rows})
    for rank, (loss, gradient) in enumerate(gloo(2, _loss_with_queue, shares, rounds, config)):
        assert loss == pytest.approx(expected.loss, rel=1e-5)
        torch.testing.assert_close(gradient.double(), expected.query_gradients[rank], rtol=1e-5, atol=1e-6)


def _keys(n: int, **more: torch.Tensor) -> Keys:
    return Keys(torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64), **more)


def test_what_does_not_fit_is_said_with_both_values():
    queue = NegativeQueue(QueueConfig(rows=4), DIM, Group())
    with pytest.raises(ValueError, match=r"vectors are \[2, 5\], the queue holds \[d, 3\]"):
        queue.enqueue(torch.zeros(2, 5), _keys(2), 0)
    with pytest.raises(ValueError, match=r"keys.query_ids \[1\] for 2 vectors"):
        queue.enqueue(torch.zeros(2, DIM), _keys(1), 0)
    with pytest.raises(ValueError, match=r"token vectors \[2, 4, 3\] need keys.lengths"):
        queue.enqueue(torch.zeros(2, 4, DIM), _keys(2), 0)
    queue.enqueue(torch.zeros(2, DIM), _keys(2), 0)
    with pytest.raises(ValueError, match=r"columns \['document_ids', 'labels', 'query_ids'\], the queue's rows \['doc"):
        queue.enqueue(torch.zeros(1, DIM), _keys(1, labels=torch.zeros(1, dtype=torch.int64)), 1)
    per_task = NegativeQueue(QueueConfig(rows=4, per="tasks"), DIM, Group())
    with pytest.raises(ValueError, match=r"a queue per tasks needs keys.tasks, which is None"):
        per_task.enqueue(torch.zeros(2, DIM), _keys(2), 0)
    queues = Queues(QueueConfig(rows=4, others=[{"name": "queries", "rows": 2}]), DIM, Group())
    with pytest.raises(ValueError, match="there are queues of queries, which were not given"):
        queues.enqueue({"documents": (torch.zeros(2, DIM), _keys(2))}, 0)


def test_names_of_queues_say_whose_encodings_they_keep():
    config = QueueConfig(others=[{"name": "queries/late", "rows": 2}])
    assert list(config.by_name) == ["queries/late"]
    assert Queues(config, DIM, Group()).sides == {"queries"}
    for wrong in ({"name": "late", "rows": 2}, {"name": "documents", "rows": 2}, {"name": "queries", "rows": 0}):
        with pytest.raises(ValidationError):
            QueueConfig(others=[wrong])
    with pytest.raises(ValidationError, match="two of `others` are named 'queries'; rename one"):
        QueueConfig(others=[{"name": "queries", "rows": 2}] * 2)
