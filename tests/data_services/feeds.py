"""A plan over sources of made-up rows, and what of it reaches the workers without Ray."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_services.columns import SCHEMA
from data_services.items import TEXT, Kinds
from data_services.order import Plan, RowGroups, SourceShape
from data_services.schema import UNKNOWN, Batch, Column, Ragged, RunError, Undecodable, text_id
from data_services.stream import BatchReader, LocalStream

BUDGET = 64


def record(name: str, row: int, columns: frozenset[str]) -> dict[str, object]:
    """What source `name` holds at `row`: one to three positives, none to three negatives, whose texts name all that."""
    query = f"{name} query {row} " + "q" * (row % 7)
    positives = [f"{name} document {row} {i}" + "d" * (row % 11) for i in range(1 + row % 3)]
    negatives = [f"{name} negative {row} {i}" for i in range(row % 4)]
    full = {
        Column.ID: f"{row}",
        Column.QUERY: query,
        Column.POSITIVES: positives,
        Column.NEGATIVES: negatives,
        Column.QUERY_ID: text_id(query),
        Column.POSITIVE_IDS: [text_id(p) for p in positives],
        Column.NEGATIVE_IDS: [text_id(n) for n in negatives],
        Column.POSITIVE_SCORES: [row + i / 8 for i in range(len(positives))],
        Column.NEGATIVE_SCORES: [-row - i / 8 for i in range(len(negatives))],
        Column.WEIGHT: row / 4,
        Column.FREQUENCY: row + 0.5,
        Column.LABEL: row % 5,
        Column.TASK: row % 2,
        Column.LANGUAGE: UNKNOWN if row % 3 else 7,
        Column.MODALITY: 1,
    }
    return {key: None if key in Column.OPTIONAL and key not in columns else value for key, value in full.items()}


@dataclasses.dataclass(frozen=True)
class FakeSource:
    name: str
    rows: int
    columns: frozenset[str] = frozenset()
    broken: int = -1  # a row that can't be read
    deadly: tuple[int, Path] | None = None  # a row whose first reading kills the process, and where that is noted
    kinds: Kinds = TEXT

    def read(self, rows: np.ndarray) -> pa.Table:
        if self.broken in rows:
            raise RunError(f"source {self.name}, row {self.broken}: the file is gone")
        if self.deadly is not None and self.deadly[0] in rows and not self.deadly[1].exists():
            self.deadly[1].touch()
            os._exit(1)
        return pa.Table.from_pylist([record(self.name, int(row), self.columns) for row in rows], schema=SCHEMA)


class Refuses:
    """Characters, but for texts with certain words in them."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self, texts, field, tasks=None):
        for text in texts:
            if any(word in text for word in self.words):
                raise Undecodable(f"{text[:20]!r} isn't text")
        return Characters()(texts, field, tasks)

    def prompt_tokens(self, field, task=None):
        return Characters().prompt_tokens(field, task)


class Characters:
    """A text's tokens are its characters after the field's first letter, which is its prompt; two of it in task 1."""

    def __call__(self, texts, field, tasks=None):
        prompts = [field[:1] * self.prompt_tokens(field, task) for task in tasks or [None] * len(texts)]
        return Ragged.of([[ord(c) for c in prompt + text] for prompt, text in zip(prompts, texts, strict=True)])

    def prompt_tokens(self, field, task=None):
        return 2 if task == 1 else 1


A, B = frozenset({Column.POSITIVE_SCORES, Column.LABEL, Column.TASK}), frozenset({Column.LABEL, Column.WEIGHT})


def reader(batch: int = 10, steps: int = 24, broken: int = -1, columns=(A, B), positives: int = 2) -> BatchReader:
    shapes = [SourceShape("a", 60, RowGroups.of([20] * 3), "fa"), SourceShape("b", 45, RowGroups.of([15] * 3), "fb")]
    plan = Plan(5, batch, shapes, steps=steps, homogeneous=False, window_groups=2)
    sources = [FakeSource("a", 60, columns[0], broken), FakeSource("b", 45, columns[1])]
    return BatchReader(plan, sources, Characters(), negatives=2, positives=positives)


def flat(batch: Batch) -> dict[str, object]:
    """Everything in a batch, for comparison."""

    def plain(value):
        if isinstance(value, Ragged):
            return plain(value.values), plain(value.offsets)
        if isinstance(value, tuple):
            return [plain(chunk) for chunk in value]
        return (str(value.dtype), value.tobytes()) if isinstance(value, np.ndarray) else value

    return {field.name: plain(getattr(batch, field.name)) for field in dataclasses.fields(batch)}


def local(world_size: int, rank: int, start: int = 0, steps: int = 24) -> list[dict[str, object]]:
    return [flat(b) for b in LocalStream(reader(steps=steps), world_size, rank, BUDGET)(start)]
