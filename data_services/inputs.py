"""What a model with several towers reads of items: each goes to the tower of its field, or of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_services.items import Item, Media
from data_services.ragged import Inputs, Ragged, arrays_of
from data_services.schema import Tokenize, Undecodable


@dataclass(frozen=True)
class Routed:
    """A `Tokenize` for several towers.

    readers  by name, in the order of the towers: what makes a tower's inputs
    by       what the names are: fields ("query", "document") or kinds ("text", "image", …; "parts")
    """

    readers: Mapping[str, Tokenize]
    by: Literal["field", "kind"]

    def __call__(self, items: Sequence[Item], field: str, tasks: Sequence[int] | None = None) -> Inputs:
        names = [field.rpartition("-")[2]] * len(items) if self.by == "field" else [kind_of(item) for item in items]
        parts: list[Ragged] = []
        places: list[int] = []
        for tower, (name, reader) in enumerate(self.readers.items()):
            where = [i for i, its in enumerate(names) if its == name]
            if where:
                of_tasks = None if tasks is None else [tasks[i] for i in where]
                parts.append(Inputs.of_tower(reader([items[i] for i in where], field, of_tasks), tower))
                places += where
        if len(places) < len(items):
            lost = next(name for name in names if name not in self.readers)
            raise Undecodable(f"the model has no tower for {lost}, it has {', '.join(self.readers)}")
        together = Ragged.concat(parts) if parts else Inputs.of_tower(Ragged.of([]), 0)
        assert isinstance(together, Inputs)
        return together if places == sorted(places) else together.take(np.argsort(places))

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        reader = self.readers.get(field.rpartition("-")[2] if self.by == "field" else "text")
        return reader.prompt_tokens(field, task) if reader else 0


def kind_of(item: Item) -> str:
    """ "text", the kind of a medium, or "parts"."""
    if isinstance(item, str):
        return "text"
    return item.kind if isinstance(item, Media) else "parts"


@dataclass(frozen=True)
class Parts:
    """A `Tokenize` of items of parts: for each part `PART.KIND.ARRAY`, what the reader of its kind makes of it; of a
    text `PART.text.tokens`. An item has as many placeholders as its parts have tokens.

    readers  by kind
    names    of the parts
    """

    readers: Mapping[str, Tokenize]
    names: tuple[str, ...]

    def __call__(self, items: Sequence[Item], field: str, tasks: Sequence[int] | None = None) -> Inputs:
        """Raises Undecodable where a part is damaged, isn't named, or is of a kind without a tower."""
        arrays: dict[str, Ragged] = {}
        counts = np.zeros(len(items), np.int64)
        for item in items:
            assert isinstance(item, Mapping), "the tower of parts is given items of parts"
            if unknown := next((name for name in item if name not in self.names), None):
                raise Undecodable(f"a part {unknown!r}, and model.fields names {', '.join(self.names)}")
            if kind := next((its for part in item.values() if (its := kind_of(part)) not in self.readers), None):
                raise Undecodable(f"a part is {kind}, and the model has no tower for it")
        for name in self.names:
            parts = [item.get(name) if isinstance(item, Mapping) else None for item in items]
            for kind, reader in self.readers.items():
                there = [i for i, part in enumerate(parts) if part is not None and kind_of(part) == kind]
                if not there:  # nor on another worker: a global batch is read whole
                    continue
                of_tasks = None if tasks is None else [tasks[i] for i in there]
                read = reader([part for i in there if (part := parts[i]) is not None], field, of_tasks)
                counts[there] += read.lengths
                own = {_TOKENS: Ragged(read.values, read.offsets)} if kind == "text" else arrays_of(read)
                arrays |= {f"{name}.{kind}.{array}": _spread(its, there, len(items)) for array, its in own.items()}
        offsets = np.concatenate([[0], np.cumsum(np.maximum(counts, 1))])
        return Inputs(np.zeros(offsets[-1], np.int32), offsets, arrays)

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        """A part's prompt is pooled with it."""
        return 0


_TOKENS = "tokens"


def _spread(lists: Ragged, places: Sequence[int], n: int) -> Ragged:
    """The lists as those at `places` of n, all others empty."""
    lengths = np.zeros(n, np.int64)
    lengths[list(places)] = lists.lengths
    return Ragged(lists.values, np.concatenate([[0], np.cumsum(lengths)]))
