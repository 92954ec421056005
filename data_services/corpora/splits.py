"""Which split of a built-in corpus something is in: a hash of its name says, so that it never changes sides."""

from __future__ import annotations

from data_services.items import text_id

SPLITS = ("train", "validation", "heldout")
_HELD_OUT_ONE_IN = 7
_VALIDATION_ONE_IN = 10


def split_of(key: str) -> str:
    """The split of everything that goes by this key: a seventh is held out, a tenth of the rest is for validation."""
    place = text_id(key) % (_HELD_OUT_ONE_IN * _VALIDATION_ONE_IN)
    if place < _VALIDATION_ONE_IN:
        return "heldout"
    return "validation" if place < _VALIDATION_ONE_IN + _HELD_OUT_ONE_IN - 1 else "train"
