"""What a queue held comes back from a checkpoint, at the same number of workers and at any other."""

import pytest
import torch

from data_services.schema import UsageError
from tests.trainers.queues import (
    DIM,
    KINDS,
    STEPS,
    Replicated,
    assert_equal,
    enqueue,
    on_ranks,
    run,
)
from trainers.collectives import Group
from trainers.config import QueueConfig
from trainers.negative_queue import NegativeQueue, Queues
from trainers.objectives.keys import Keys


def test_resharding_4_2_3_1_4_keeps_the_newest_rows_of_every_queue(gloo):
    section = {
        "rows": 11,
        "max_age_steps": 7,
        "others": [
            {"name": "queries", "rows": 6, "dtype": "bfloat16"},
            {"name": "documents/by_task", "rows": 4, "per": "tasks", "start": "filled"},
            {"name": "queries/by_language", "rows": 3, "per": "languages"},
        ],
    }
    twins = {name: Replicated(config) for name, config in QueueConfig(**section).by_name.items()}
    done, states = 0, None
    for world_size in (4, 2, 3, 1, 4):
        steps = STEPS[world_size][:3]
        ranks = on_ranks(gloo, world_size, section, steps, states, done)
        assert_equal(_rounded(ranks), _rounded_twins(twins), done, 0)
        held = [sum(map(len, rows[0].values())) for _, rows, _ in ranks]
        assert max(held) - min(held) <= len(twins)
        for step, counts in enumerate(steps, done):
            enqueue(twins, counts, step)
        done += len(steps)
        states = [state for state, *_ in ranks]
        assert_equal(_rounded(ranks), _rounded_twins(twins), done)
        numbers = torch.cat([state["documents.sequence"] for state in states]).tolist()
        assert len(numbers) == len(set(numbers))


def _rounded(ranks):
    """The query-side queue holds bfloat16."""
    return [
        (state, [{name: [_cast(name, row) for row in rows] for name, rows in step.items()} for step in seen], nbytes)
        for state, seen, nbytes in ranks
    ]


def _rounded_twins(twins):
    for twin_name, twin in twins.items():
        twin.rows = [_cast(twin_name, row) for row in twin.rows]
    return twins


def _cast(name: str, row: tuple) -> tuple:
    return (*row[:-1], torch.tensor(row[-1]).bfloat16().tolist()) if name == "queries" else row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "per task"])
def test_the_same_number_of_workers_goes_on_with_the_same_rows_in_the_same_places(gloo, kind, dtype):
    section, steps = {"rows": 9, "dtype": dtype, **KINDS[kind]}, STEPS[2]
    through = on_ranks(gloo, 2, section, steps)
    half = on_ranks(gloo, 2, section, steps[:4])
    resumed = on_ranks(gloo, 2, section, steps[4:], [state for state, *_ in half], 4)
    for (state, seen, _), (again, seen_again, _) in zip(through, resumed, strict=True):
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)
        assert all(x.is_contiguous() and x.device.type == "cpu" for x in state.values())
        assert state["documents.vectors"].dtype == getattr(torch, dtype)
        assert seen[4:] == seen_again


def test_a_smaller_queue_takes_up_the_newest_of_a_larger_one():
    state, *_ = run({"rows": 20}, [[20]])
    smaller = Queues(QueueConfig(rows=6), DIM, Group())
    smaller.restore([state])
    assert sorted(smaller.rows(1)["documents"].numbers.tolist()) == list(range(14, 20))


def _token_queue(steps, capacity, states=None, first=0):
    """On a rank: state and [(number, its valid token vectors)] of a queue of token vectors, each step of another L."""
    group = Group()
    queue = NegativeQueue(QueueConfig(rows=capacity), DIM, group)
    if states is not None:
        queue.restore(states)
    for step, counts in enumerate(steps, first):
        queue.enqueue(*_token_rows(step, group.rank, counts[group.rank]), step)
    rows = queue.rows(first + len(steps))
    valid = [vectors[:n].tolist() for vectors, n in zip(rows.vectors, rows.keys.lengths, strict=True)]
    assert not any(vectors[n:].any() for vectors, n in zip(rows.vectors, rows.keys.lengths, strict=True))
    return queue.state(), list(zip(rows.numbers.tolist(), valid, strict=True))


def _token_rows(step: int, rank: int, rows: int):
    generator = torch.Generator().manual_seed(100 * step + rank)
    longest = 2 + (3 * step + rank) % 5
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    vectors = torch.randn(rows, longest, DIM, generator=generator)
    vectors[torch.arange(longest) >= lengths[:, None]] = 0
    ids = torch.arange(rows)
    return vectors, Keys(ids, ids, lengths=lengths)


def test_token_vectors_of_any_length_are_kept_and_resharded(gloo):
    capacity, expected, states, done = 6, [], None, 0
    for world_size in (2, 3, 2):
        steps = STEPS[world_size][:3]
        ranks = gloo(world_size, _token_queue, steps, capacity, states, done)
        for step, counts in enumerate(steps, done):
            for rank, rows in enumerate(counts):
                vectors, keys = _token_rows(step, rank, rows)
                expected += [row[:n].tolist() for row, n in zip(vectors, keys.lengths, strict=True)]
        done, states = done + len(steps), [state for state, _ in ranks]
        newest = list(enumerate(expected))[-capacity:]
        assert sorted(row for _, rows in ranks for row in rows) == newest


def test_a_checkpoint_of_other_queues_is_refused():
    plain, per_task = {"rows": 4}, {"rows": 4, "per": "tasks"}
    state, *_ = run(plain, [[3]])
    wider = Queues(QueueConfig(**plain), DIM + 1, Group())
    with pytest.raises(UsageError, match="rows have 3 dimensions and the model gives 4"):
        wider.restore([state])
    with pytest.raises(UsageError, match=r"counters \['next'\], a queue with per: tasks needs"):
        Queues(QueueConfig(**per_task), DIM, Group()).restore([state])
    more = QueueConfig(**plain, others=[{"name": "queries", "rows": 2}])
    with pytest.raises(UsageError, match=r"has the queues \['documents'\] and the recipe \['documents', 'queries'\]"):
        Queues(more, DIM, Group()).restore([state])
    later = state | {"documents.next": torch.tensor([7])}
    with pytest.raises(ValueError, match=r"states of different moments, next = \[3, 7\]"):
        Queues(QueueConfig(**plain), DIM, Group()).restore([state, later])
