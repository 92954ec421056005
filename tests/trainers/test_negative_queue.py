"""The sharded queues hold what replicated ones would: the newest rows, before and after re-sharding."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_services.schema import UsageError
from tests.twins import dense_contrastive, in_type, random_shares
from trainers.collectives import Group
from trainers.config import OneQueue, QueueConfig
from trainers.negative_queue import KEYS, NegativeQueue, QueueRows, Queues
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.keys import UNKNOWN, Keys
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.queue_metrics import area_under_curve, duplicate_share, sampled, separability
from trainers.row_store import RowStore

DIM = 3
# rows of each worker, step by step: none, uneven, more than K at once
STEPS = {
    1: [[4], [0], [9], [1], [30], [2], [3]],
    2: [[4, 1], [0, 3], [2, 2], [20, 1], [0, 0], [3, 5], [1, 2]],
    3: [[4, 1, 0], [0, 3, 1], [2, 2, 2], [1, 20, 1], [0, 0, 0], [3, 5, 2], [1, 2, 3]],
    4: [[1, 1, 1, 1], [5, 0, 0, 2], [3, 3, 3, 3]],
}
TASKS = torch.tensor([7, UNKNOWN, -2])


def _fresh(step: int, rank: int, rows: int) -> tuple[torch.Tensor, Keys]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.arange(rows) + 100 * step + 10_000 * rank
    tasks = TASKS[torch.randint(len(TASKS), (rows,), generator=generator)]
    keys = Keys(-ids, ids, labels=ids + 5, tasks=tasks, languages=ids % 2)
    return torch.randn(rows, DIM, generator=generator), keys


def _sides(step: int, rank: int, rows: int) -> dict:
    """Documents, and two queries fewer."""
    return {"documents": _fresh(step, rank, rows), "queries": _fresh(step, rank + 50, max(0, rows - 2))}


def _listed(rows: QueueRows) -> list[tuple]:
    keys = rows.keys.columns()
    columns = [rows.numbers, rows.steps, *(keys[name] for name in KEYS if name in keys), rows.vectors.float()]
    return [tuple(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


class Replicated:
    """A queue as one list that every worker would hold whole, row by row."""

    def __init__(self, config: OneQueue) -> None:
        self.config, self.total, self.of_class = config, 0, Counter()
        self.rows: list[tuple] = []
        self.classes: list[int] = []

    def enqueue(self, workers: list[tuple[torch.Tensor, Keys]], step: int) -> None:
        for vectors, keys in workers:
            columns = [column.tolist() for column in keys.columns().values()]
            classes = getattr(keys, self.config.per).tolist() if self.config.per else [0] * len(vectors)
            for value, vector, *row in zip(classes, vectors.tolist(), *columns, strict=True):
                self.rows.append((self.total, step, *row, vector))
                self.classes.append(value)
                self.of_class[value] += 1
                self.total += 1

    def given(self, step: int) -> list[tuple] | None:
        """The rows for the loss of `step`, None where there is no queue yet."""
        config, kept, room = self.config, [], defaultdict(lambda: self.config.rows)
        enough = config.rows if config.start == "filled" else 1
        if max(self.of_class.values(), default=0) < enough:
            return None
        for row, value in reversed(list(zip(self.rows, self.classes, strict=True))):
            room[value] -= 1
            young = config.max_age_steps is None or step - row[1] <= config.max_age_steps
            if room[value] >= 0 and young and self.of_class[value] >= enough:
                kept.append(row)
        return kept


def _run(section: dict, steps: list, states=None, first: int = 0):
    """On a rank: (state, the rows given for each step, bytes) of the queues after `steps`."""
    group = Group()
    queues = Queues(QueueConfig(**section), DIM, group)
    if states is not None:
        queues.restore(states)
    seen = [{name: _listed(rows) for name, rows in queues.rows(first).items()}]
    for step, counts in enumerate(steps, first):
        queues.enqueue(_sides(step, group.rank, counts[group.rank]), step)
        seen.append({name: _listed(rows) for name, rows in queues.rows(step + 1).items()})
    return queues.state(), seen, {name: queue.nbytes for name, queue in queues.by_name.items()}


def _on(gloo, world_size, *arguments):
    return [_run(*arguments)] if world_size == 1 else gloo(world_size, _run, *arguments)


def _assert_equal(ranks, twins: dict[str, Replicated], step: int, seen: int = -1) -> None:
    """Every queue's rows on all ranks together are the twin's, each once."""
    for name, twin in twins.items():
        expected = twin.given(step)
        for _, rows, _ in ranks:
            assert (name in rows[seen]) == (expected is not None)
        if expected is not None:
            assert sorted(row for _, rows, _ in ranks for row in rows[seen][name]) == sorted(expected)


def _enqueue(twins: dict[str, Replicated], counts: list[int], step: int) -> None:
    for name, twin in twins.items():
        side = "queries" if name.startswith("queries") else "documents"
        twin.enqueue([_sides(step, rank, rows)[side] for rank, rows in enumerate(counts)], step)


KINDS = {
    "plain": {},
    "young": {"max_age_steps": 2},
    "filled": {"start": "filled"},
    "per task": {"per": "tasks"},
    "per task, filled, young": {"per": "tasks", "start": "filled", "max_age_steps": 3},
}


@pytest.mark.parametrize("capacity", [1, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_together_hold_exactly_the_newest_rows(gloo, world_size, kind, capacity):
    section = {"rows": capacity, **KINDS[kind], "others": [{"name": "queries", "rows": 5}]}
    ranks = _on(gloo, world_size, section, STEPS[world_size])
    twins = {name: Replicated(config) for name, config in QueueConfig(**section).by_name.items()}
    _assert_equal(ranks, twins, 0, 0)
    for step, counts in enumerate(STEPS[world_size]):
        _enqueue(twins, counts, step)
        _assert_equal(ranks, twins, step + 1, step + 1)


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
        ranks = _on(gloo, world_size, section, steps, states, done)
        _assert_equal(_rounded(ranks), _rounded_twins(twins), done, 0)
        held = [sum(map(len, rows[0].values())) for _, rows, _ in ranks]
        assert max(held) - min(held) <= len(twins)
        for step, counts in enumerate(steps, done):
            _enqueue(twins, counts, step)
        done += len(steps)
        states = [state for state, *_ in ranks]
        _assert_equal(_rounded(ranks), _rounded_twins(twins), done)
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
    through = _on(gloo, 2, section, steps)
    half = _on(gloo, 2, section, steps[:4])
    resumed = _on(gloo, 2, section, steps[4:], [state for state, *_ in half], 4)
    for (state, seen, _), (again, seen_again, _) in zip(through, resumed, strict=True):
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)
        assert all(x.is_contiguous() and x.device.type == "cpu" for x in state.values())
        assert state["documents.vectors"].dtype == getattr(torch, dtype)
        assert seen[4:] == seen_again


def test_a_smaller_queue_takes_up_the_newest_of_a_larger_one():
    state, *_ = _run({"rows": 20}, [[20]])
    smaller = Queues(QueueConfig(rows=6), DIM, Group())
    smaller.restore([state])
    assert sorted(smaller.rows(1)["documents"].numbers.tolist()) == list(range(14, 20))


@settings(max_examples=50)
@given(
    capacity=st.integers(1, 20),
    counts=st.lists(st.integers(0, 25), max_size=20),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_any_sequence_of_sizes_leaves_the_newest_rows(capacity, counts, kind):
    section = {"rows": capacity, **KINDS[kind]}
    twins, ranks = {"documents": Replicated(QueueConfig(**section))}, [_run(section, [[n] for n in counts])]
    for step, n in enumerate(counts):
        _enqueue(twins, [n], step)
        _assert_equal(ranks, twins, step + 1, step + 1)


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
            queue.enqueue(*_fresh(step, 0, batch), step)
        row = DIM * 4 + 8 * 7  # vectors; five keys, the step and the number
        assert len(queue) == world_rows
        assert world_rows * row <= queue.nbytes <= world_rows * row * 13 / 12


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


# The loss beside it.


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


# What is observed.


def _observed(shift: float):
    """On a rank: metrics of queues with equal texts, whose rows are shifted in the first dimension, and those rows."""
    group = Group()
    config = QueueConfig(rows=60, observe_every_steps=3, others=[{"name": "queries", "rows": 40}])
    queues = Queues(config, DIM, group)
    fresh = {side: _fresh(9, group.rank + 7, 15 + group.rank) for side in ("documents", "queries")}
    empty = queues.observe(fresh, 0)
    for step in range(3):
        sides = _sides(step, group.rank, 12)
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


# Wrong input.


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


def test_a_checkpoint_of_other_queues_is_refused():
    plain, per_task = {"rows": 4}, {"rows": 4, "per": "tasks"}
    state, *_ = _run(plain, [[3]])
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


def test_names_of_queues_say_whose_encodings_they_keep():
    config = QueueConfig(others=[{"name": "queries/late", "rows": 2}])
    assert list(config.by_name) == ["queries/late"]
    assert Queues(config, DIM, Group()).sides == {"queries"}
    for wrong in ({"name": "late", "rows": 2}, {"name": "documents", "rows": 2}, {"name": "queries", "rows": 0}):
        with pytest.raises(ValidationError):
            QueueConfig(others=[wrong])
    with pytest.raises(ValidationError, match="two of `others` are named 'queries'; rename one"):
        QueueConfig(others=[{"name": "queries", "rows": 2}] * 2)
