"""What a model with several towers reads of items: each goes to the tower of its field, or of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_services.items import Item, Media
from data_services.ragged import Inputs, Ragged
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
