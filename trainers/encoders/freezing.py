"""Which weights training leaves alone."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from data_services.schema import UsageError


def freeze(module: nn.Module, patterns: Sequence[str], key: str = "model.freeze") -> None:
    """Take the weights whose names match one of the patterns out of training, as `frozen_names` finds them."""
    weights = dict(module.named_parameters())
    for name in frozen_names(weights, patterns, key):
        weights[name].requires_grad_(False)


def frozen_names(names: Collection[str], patterns: Sequence[str], key: str = "model.freeze") -> set[str]:
    """The names that match one of the patterns: `*` stands for anything, dots included, `?` for one character.

    UsageError where a pattern matches none, with the nearest names, or all of them match.
    """
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            nearest = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0))
            raise UsageError(f"{key}: {pattern} matches no weight; the nearest names are {nearest}")
        frozen |= matched
    if patterns and len(frozen) == len(names):
        raise UsageError(f"{key}: {', '.join(patterns)} leaves no weight to train; remove a pattern")
    return frozen
