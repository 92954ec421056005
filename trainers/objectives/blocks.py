"""What an exchange is made of: the queries of all workers, this worker's blocks of candidates, and their tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.collectives import Group
from trainers.objectives.keys import Keys
from trainers.objectives.masks import HIDDEN, Mask
from trainers.objectives.reductions import Seen, Wanted
from trainers.objectives.similarity import Keyed, Similarity


@dataclass(frozen=True)
class Block:
    """Candidates that stay on this worker.

    vectors   [n, D], or [n, L, D] token vectors
    keys      [n]
    masks     which pairs of a row and one of these are not compared
    fresh     they carry gradient; False: the queue's rows
    diagonal  candidate j is row j's own positive, or row j itself, and is left out; for every j < b, n
    columns   the first b candidates (or all n, where they are fewer) are reduced over all rows, too
    share     of a block that isn't fresh, the exact share that counts, each query's hardest (hardest.py)
    """

    vectors: Tensor
    keys: Keys
    masks: tuple[Mask, ...] = ()
    fresh: bool = True
    diagonal: bool = False
    columns: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Tile:
    """Candidates `rows` of a block as both sides see them: `by_row` [B, t]; `by_column` [c, B], of the candidates
    `positives` (a part of `rows`), None where columns aren't wanted."""

    rows: slice
    positives: slice
    by_row: Seen
    by_column: Seen | None


@dataclass(frozen=True)
class Exchange:
    """What both passes need: every worker's queries [B, D] and keys, this worker's blocks, and how tiles are scored,
    masked, cut and reduced. `own` is where this worker's b queries stand among the B; `operands` the type that float32
    vectors are multiplied in on a GPU."""

    group: Group
    sizes: list[int]
    queries: Tensor
    query_keys: Keys
    blocks: tuple[Block, ...]
    score: Similarity
    temperature: float
    wanted: Wanted
    tile: int
    operands: torch.dtype = torch.float32

    @property
    def own(self) -> slice:
        start = sum(self.sizes[: self.group.rank])
        return slice(start, start + self.sizes[self.group.rank])

    @property
    def rows(self) -> Keyed:
        return Keyed(self.queries, self.query_keys)

    def online(self, block: Block) -> bool:
        """Whether the backward pass needs nothing of the block but its expected candidate."""
        return not block.fresh and self.wanted.plain and self.score.linear

    def vectors(self, fresh: Sequence[Tensor]) -> list[Tensor]:
        """Each block's vectors; of fresh ones what autograd gave."""
        given = iter(fresh)
        return [next(given) if block.fresh else block.vectors for block in self.blocks]

    def tiles(self, block: Block, vectors: Tensor) -> Iterator[Tile]:
        """`vectors` are the block's, inside and outside of autograd."""
        for start in range(0, len(vectors), self.tile):
            yield self._tile(block, vectors, slice(start, min(start + self.tile, len(vectors))))

    def _tile(self, block: Block, vectors: Tensor, rows: slice) -> Tile:
        keys, targets = block.keys[rows], None
        logits = self.score.scores(self.rows, Keyed(vectors[rows], keys)).div_(self.temperature)
        raw = logits
        own = self.own
        among = slice(rows.start, max(rows.start, min(rows.stop, own.stop - own.start)))
        diagonal = (slice(own.start + among.start, own.start + among.stop), slice(0, among.stop - among.start))
        if self.wanted.targets is not None:
            raw = logits.clone()
            targets = self.wanted.targets.of(self.query_keys, keys, logits.dtype)
            if block.diagonal:
                targets[diagonal].diagonal().zero_()
            if not self.wanted.soft:
                logits.masked_fill_(targets > 0, HIDDEN)
        for mask in block.masks:
            if mask.symmetric:
                mask.apply(logits, self.query_keys, keys)
        if block.diagonal:
            logits[diagonal].diagonal().fill_(HIDDEN)

        asked_twice = [mask for mask in block.masks if not mask.symmetric]
        by_column = None
        if block.columns:
            first = diagonal[1]
            seen = logits[:, first].clone() if asked_twice else logits[:, first]
            for mask in asked_twice:
                mask.apply(seen.T, keys[first], self.query_keys)
            by_column = self._seen(seen.T, keys[first], self.query_keys, targets, raw, first)
        for mask in asked_twice:
            mask.apply(logits, self.query_keys, keys)
        return Tile(rows, among, self._seen(logits, self.query_keys, keys, targets, raw, None), by_column)

    def _seen(
        self, logits: Tensor, these: Keys, others: Keys, targets: Tensor | None, raw: Tensor, first: slice | None
    ) -> Seen:
        weighted = logits
        if self.wanted.weights:
            weighted = logits.clone()
            for weight in self.wanted.weights:
                weight.apply(weighted, these, others)
        if targets is None:
            return Seen(logits, weighted)
        if first is not None:
            targets, raw = targets[:, first].T, raw[:, first].T
        if self.wanted.soft:
            targets = targets.masked_fill(logits == HIDDEN, 0)
        return Seen(logits, weighted, targets, raw)
