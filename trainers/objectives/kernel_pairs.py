"""Queries against a block of candidates, as the kernels take them: tensors, and which pairs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.objectives.keys import Keys
from trainers.objectives.masks import AboveCeiling, Mask, SameClass, SameId, known

WEIGHT_TYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.bfloat16}
"""What candidates may be, and the type of their weights: float16 doesn't reach the smallest ones."""

MASKS = (SameId, SameClass, AboveCeiling)
"""The masks that `pairs` can tell."""


@dataclass(frozen=True)
class Pairs:
    """Queries against a block of candidates, and which pairs of them are compared.

    queries, candidates          [B, D], [n, D] float32, bfloat16 or float16; products are of the candidates' type
    temperature                  what scores are divided by
    row_ids, candidate_ids       [m, B], [m, n] int64; a pair with one of its m ids in common is hidden (UNKNOWN equals
                                 nothing)
    own                          candidate j and row own.start + j are not compared, j < own.stop - own.start
    row_ceiling, column_ceiling  [B], [n] float32; the row, or the candidate where it reduces its column, doesn't see
                                 logits above its own; None: it sees all

    Raises ValueError where shapes or types disagree.
    """

    queries: Tensor
    candidates: Tensor
    temperature: float
    row_ids: Tensor | None = None
    candidate_ids: Tensor | None = None
    own: slice | None = None
    row_ceiling: Tensor | None = None
    column_ceiling: Tensor | None = None

    def __post_init__(self) -> None:
        (rows, width), (n, of_candidates) = self.queries.shape, self.candidates.shape
        if width != of_candidates:
            raise ValueError(f"queries have {width} columns on axis 1, candidates {of_candidates}")
        if self.candidates.dtype not in WEIGHT_TYPES:
            raise ValueError(f"candidates are {self.candidates.dtype}: float32, bfloat16 or float16 is needed")
        for name, column, expected in (
            ("row_ids", self.row_ids, rows),
            ("candidate_ids", self.candidate_ids, n),
            ("row_ceiling", self.row_ceiling, rows),
            ("column_ceiling", self.column_ceiling, n),
        ):
            if column is not None and column.shape[-1] != expected:
                raise ValueError(f"{name} has {column.shape[-1]} entries on its last axis, {expected} are needed")

    @property
    def rows(self) -> int:
        return len(self.queries)

    @property
    def weight_type(self) -> torch.dtype:
        return WEIGHT_TYPES[self.candidates.dtype]


def pairs(
    queries: Tensor,
    query_keys: Keys,
    candidates: Tensor,
    candidate_keys: Keys,
    masks: Sequence[Mask],
    temperature: float,
    own: slice | None = None,
) -> Pairs:
    """The pairs that the exchange's masks leave, all of MASKS. queries [B, D], candidates [n, D]."""
    ids: list[tuple[Tensor, Tensor]] = []
    for mask in masks:
        if isinstance(mask, SameId):
            names = [name for name, compared in (("document", mask.document), ("query", mask.query)) if compared]
            ids += [known(f"{name}_ids", query_keys, candidate_keys) for name in names]
        elif isinstance(mask, SameClass):
            ids.append(known(mask.column, query_keys, candidate_keys))
    row_ids, candidate_ids = (torch.stack(side) for side in zip(*ids, strict=True)) if ids else (None, None)
    ceilings = any(isinstance(mask, AboveCeiling) for mask in masks)
    return Pairs(
        queries,
        candidates,
        temperature,
        row_ids,
        candidate_ids,
        own,
        query_keys.ceiling if ceilings else None,
        candidate_keys.ceiling if ceilings else None,
    )
