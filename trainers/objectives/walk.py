"""One block of candidates through both passes, tile by tile in PyTorch, or in Triton kernels on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.objectives import kernel_pairs, kernels
from trainers.objectives.blocks import Block, Exchange
from trainers.objectives.reductions import Reduced, Running, Seen, slopes
from trainers.objectives.similarity import Keyed


@dataclass(frozen=True)
class Finished:
    """What was reduced, over all workers, and dL/d(it): of all rows [B], and of this worker's columns."""

    rows: Reduced
    of_rows: Reduced
    columns: Reduced
    of_columns: Reduced


def reduced(exchange: Exchange, block: Block, vectors: Tensor) -> tuple[Running, list[Running]]:
    """A block's part of the rows' reduction, and its columns' by tile. `vectors` are the block's, inside and outside
    of autograd."""
    by = _reduced_by_kernel if _in_kernels(exchange, block) else _reduced_by_tiles
    return by(exchange, block, vectors)


def back(
    exchange: Exchange, block: Block, vectors: Tensor, finished: Finished, partial: Tensor, of_logits: Tensor
) -> Tensor | None:
    """Adds a block's part of the queries' gradient to `partial`, and of sum dL/dl l to `of_logits`; gives the
    candidates' gradient where they are fresh."""
    by = _back_by_kernel if _in_kernels(exchange, block) else _back_by_tiles
    return by(exchange, block, vectors, finished, partial, of_logits)


def _reduced_by_tiles(exchange: Exchange, block: Block, vectors: Tensor) -> tuple[Running, list[Running]]:
    wanted, everyone, online = exchange.wanted, exchange.queries, exchange.online(block)
    running, columns = Running(wanted, everyone, len(everyone), everyone.shape[1] if online else None), []
    for tile in exchange.tiles(block, vectors):
        if tile.by_column is not None and tile.positives.stop > tile.positives.start:
            columns.append(Running(wanted, everyone, tile.positives.stop - tile.positives.start))
            columns[-1].add(_kept(tile.by_column))
        running.add(tile.by_row, vectors[tile.rows] if online else None)
    return running, columns


def _back_by_tiles(
    exchange: Exchange, block: Block, vectors: Tensor, finished: Finished, partial: Tensor, of_logits: Tensor
) -> Tensor | None:
    score, wanted = exchange.score, exchange.wanted
    gradient = torch.empty_like(vectors) if block.fresh else None
    for tile in exchange.tiles(block, vectors):
        weights = slopes(wanted, tile.by_row, finished.rows, finished.of_rows)
        if tile.by_column is not None:
            at = tile.positives
            part = slopes(wanted, tile.by_column, finished.columns[at], finished.of_columns[at])
            weights[:, : at.stop - at.start] += part.T
        if not score.homogeneous:
            logits = tile.by_row.logits if tile.by_row.raw is None else tile.by_row.raw
            of_logits += torch.where(weights == 0, weights, weights * logits).sum()
        candidates = Keyed(vectors[tile.rows], block.keys[tile.rows])
        scale = 1 / exchange.temperature
        found = score.gradients(weights, scale, exchange.rows, candidates, partial, of_candidates=block.fresh)
        if gradient is not None:
            assert found is not None
            gradient[tile.rows] = found.to(gradient.dtype)
    return gradient


def _in_kernels(exchange: Exchange, block: Block) -> bool:
    return kernels.usable(block.vectors, exchange.score, block.masks, exchange.wanted)


def _pairs(exchange: Exchange, block: Block, vectors: Tensor) -> tuple[kernel_pairs.Pairs, int]:
    """What the kernels are given of a block, and how many columns of it are wanted."""
    own = slice(exchange.own.start, min(exchange.own.stop, exchange.own.start + len(vectors)))
    diagonal = own if block.diagonal else None
    keys, masks = block.keys, block.masks
    if vectors.dtype == torch.float32:
        vectors = vectors.to(exchange.operands)
    given = exchange.queries, exchange.query_keys, vectors, keys, masks, exchange.temperature, diagonal
    return kernel_pairs.pairs(*given), own.stop - own.start if block.columns else 0


def _reduced_by_kernel(exchange: Exchange, block: Block, vectors: Tensor) -> tuple[Running, list[Running]]:
    pairs, columns = _pairs(exchange, block, vectors)
    part = kernels.forward_block(pairs, columns=columns, values=not block.fresh)
    running = Running(exchange.wanted, exchange.queries, pairs.rows)
    running.anchor, running.totals, running.values = part.maximum, part.total[None], part.values
    running.hardest = running.anchor
    if not columns:
        return running, []
    of_columns = Running(exchange.wanted, exchange.queries, columns)
    of_columns.anchor, of_columns.totals = part.column_maximum, part.column_total[None]
    of_columns.hardest = of_columns.anchor
    return running, [of_columns]


def _back_by_kernel(
    exchange: Exchange, block: Block, vectors: Tensor, finished: Finished, partial: Tensor, of_logits: Tensor
) -> Tensor:
    pairs, columns = _pairs(exchange, block, vectors)
    of_columns = (finished.columns.denominators[0], finished.of_columns.denominators[0]) if columns else (None, None)
    gradient = kernels.backward_block(
        pairs, finished.rows.denominators[0], finished.of_rows.denominators[0], partial, *of_columns
    )
    return gradient.to(vectors.dtype)


def _kept(seen: Seen) -> Seen:
    """The same with logits that may be overwritten: the rows still need theirs."""
    return Seen(seen.logits, seen.weighted.clone(), seen.targets, seen.raw)
