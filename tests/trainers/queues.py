"""What the tests of queues share: rows drawn for them, a run of queues on a rank, and the replicated twin."""

from collections import Counter, defaultdict

import torch

from trainers.collectives import Group
from trainers.config import OneQueue, QueueConfig
from trainers.negative_queue import KEYS, QueueRows, Queues
from trainers.objectives.keys import UNKNOWN, Keys

DIM = 3
# rows of each worker, step by step: none, uneven, more than K at once
STEPS = {
    1: [[4], [0], [9], [1], [30], [2], [3]],
    2: [[4, 1], [0, 3], [2, 2], [20, 1], [0, 0], [3, 5], [1, 2]],
    3: [[4, 1, 0], [0, 3, 1], [2, 2, 2], [1, 20, 1], [0, 0, 0], [3, 5, 2], [1, 2, 3]],
    4: [[1, 1, 1, 1], [5, 0, 0, 2], [3, 3, 3, 3]],
}
TASKS = torch.tensor([7, UNKNOWN, -2])


def fresh_rows(step: int, rank: int, rows: int) -> tuple[torch.Tensor, Keys]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.arange(rows) + 100 * step + 10_000 * rank
    tasks = TASKS[torch.randint(len(TASKS), (rows,), generator=generator)]
    keys = Keys(-ids, ids, labels=ids + 5, tasks=tasks, languages=ids % 2)
    return torch.randn(rows, DIM, generator=generator), keys


def sides_of(step: int, rank: int, rows: int) -> dict:
    """Documents, and two queries fewer."""
    return {"documents": fresh_rows(step, rank, rows), "queries": fresh_rows(step, rank + 50, max(0, rows - 2))}


def listed(rows: QueueRows) -> list[tuple]:
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


def run(section: dict, steps: list, states=None, first: int = 0):
    """On a rank: (state, the rows given for each step, bytes) of the queues after `steps`."""
    group = Group()
    queues = Queues(QueueConfig(**section), DIM, group)
    if states is not None:
        queues.restore(states)
    seen = [{name: listed(rows) for name, rows in queues.rows(first).items()}]
    for step, counts in enumerate(steps, first):
        queues.enqueue(sides_of(step, group.rank, counts[group.rank]), step)
        seen.append({name: listed(rows) for name, rows in queues.rows(step + 1).items()})
    return queues.state(), seen, {name: queue.nbytes for name, queue in queues.by_name.items()}


def on_ranks(gloo, world_size, *arguments):
    return [run(*arguments)] if world_size == 1 else gloo(world_size, run, *arguments)


def assert_equal(ranks, twins: dict[str, Replicated], step: int, seen: int = -1) -> None:
    """Every queue's rows on all ranks together are the twin's, each once."""
    for name, twin in twins.items():
        expected = twin.given(step)
        for _, rows, _ in ranks:
            assert (name in rows[seen]) == (expected is not None)
        if expected is not None:
            assert sorted(row for _, rows, _ in ranks for row in rows[seen][name]) == sorted(expected)


def enqueue(twins: dict[str, Replicated], counts: list[int], step: int) -> None:
    for name, twin in twins.items():
        side = "queries" if name.startswith("queries") else "documents"
        twin.enqueue([sides_of(step, rank, rows)[side] for rank, rows in enumerate(counts)], step)


KINDS = {
    "plain": {},
    "young": {"max_age_steps": 2},
    "filled": {"start": "filled"},
    "per task": {"per": "tasks"},
    "per task, filled, young": {"per": "tasks", "start": "filled", "max_age_steps": 3},
}
