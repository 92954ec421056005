"""What a tower reads of a chunk, whatever the kind of its items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TowerInputs:
    """n items that are encoded together. A tower takes of it what its kind of item has.

    ids, mask      [n, L] int64, tokens padded on the right; placeholders where an item is no text
    prompt_tokens  [n] int64, leading tokens that are the prompt; needed where the spec leaves it out of pooling
    queries        [n] bool, which items are queries; needed where `spec.needs_queries`
    arrays         what is read besides tokens: by name the items' rows end to end [T, ...], and under
                   `lengths_of(name)` [n] how many are each item's
    tower          which of several towers reads them; None: there is one
    """

    ids: Tensor
    mask: Tensor
    prompt_tokens: Tensor | None = None
    queries: Tensor | None = None
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    tower: int | None = None


def lengths_of(name: str) -> str:
    """Under which name stands [n] how many rows of an array are each item's."""
    return f"{name}_lengths"
