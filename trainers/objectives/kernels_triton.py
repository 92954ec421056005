"""The tiles of kernels.py on a GPU, in Triton. Only a machine that has Triton imports this file.

A program takes a tile of M queries and N candidates, forms their inner products in float32 from operands of 16 or 32
bits, K columns at a time, and scales and masks them where they stand, in registers: no logit reaches memory.

Inside the kernels logits, anchors and ceilings are in base 2, l log2(e), since exp2 is the one exponential that the
hardware has. Rows and columns out of range are hidden like any other. A pointer that is None is compiled away.

    row_ids, candidate_ids        [KEYS, B], [KEYS, n] int64; a pair with one of them in common is hidden
    row_ceiling, column_ceiling   [B], [c]; the row, or the column, doesn't see logits above its own
    own_start, own_count          candidate j < own_count and row own_start + j are not compared
    columns                       c, the number of candidates, the first ones, that are reduced over rows too
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run as Python on CPU tensors (TRITON_INTERPRET=1, read when Triton is imported)."""

_UNKNOWN: tl.constexpr = tl.constexpr(-(2**63))
_NOTHING: tl.constexpr = tl.constexpr(float("-inf"))
_SIZES = ["B", "n", "columns", "own_start", "own_count"]  # they change from step to step: one binary for all
_GROUP: tl.constexpr = tl.constexpr(8)


def tile_shape(operand_bytes: int) -> dict[str, int]:
    """M and N. A tile of 128 x 256 asks the second-level cache for 1/85 byte per operation, about what it can give."""
    if INTERPRETED:
        return {"M": 16, "N": 64}
    return {"M": 128, "N": 256 if operand_bytes == 2 else 128}


_SAFE = triton.Config({"K": 32}, num_warps=8, num_stages=3)  # fits every card from compute capability 8.0 on
_H100 = [triton.Config({"K": 64}, num_warps=8, num_stages=stages) for stages in (3, 4)]
_CHOICES = [_SAFE] if INTERPRETED else [*_H100, _SAFE]
"""What is timed before a first use on a card, and remembered on disk; one that doesn't fit the card is passed over."""


def _prune(choices: list[triton.Config], *_: Any, **__: Any) -> list[triton.Config]:
    """One choice where results must repeat: which one is fastest may differ between runs."""
    return [_SAFE] if torch.are_deterministic_algorithms_enabled() else choices


_TUNED = {"key": ["D", "KEYS"], "prune_configs_by": {"early_config_prune": _prune}, "cache_results": True}


@triton.jit
def _products(
    queries,
    candidates,
    rows,
    at,
    B,
    n,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """[M, N] inner products of queries `rows` and candidates `at`; those out of range repeat the first one's."""
    depth = tl.arange(0, K)
    q = queries + tl.where(rows < B, rows, 0).to(tl.int64)[:, None] * D + depth[None, :]
    k = candidates + tl.where(at < n, at, 0).to(tl.int64)[None, :] * D + depth[:, None]
    products = tl.zeros((M, N), tl.float32)
    for start in range(0, D, K):
        if D % K == 0:
            left, right = tl.load(q), tl.load(k)
        else:
            inside = depth < D - start
            left, right = tl.load(q, inside[None, :], 0.0), tl.load(k, inside[:, None], 0.0)
        products = tl.dot(left, right, products, input_precision=PRECISION)
        q += K
        k += K
    return products


@triton.jit
def _masked(logits, rows, at, last, row_ids, candidate_ids, B, n, own_start, own_count, KEYS: tl.constexpr):
    """The logits with -inf where a row and a candidate are not compared, whichever side asks, and from `last` on."""
    # Mask after mask, ids first: a thread holds half its registers in logits, and this order spills the fewest.
    for key in tl.static_range(KEYS):
        of_row = tl.load(row_ids + key * B + rows, rows < B, _UNKNOWN)
        of_candidate = tl.load(candidate_ids + key * n + at, at < n, _UNKNOWN)
        same = (of_row[:, None] == of_candidate[None, :]) & (of_row != _UNKNOWN)[:, None]
        logits = tl.where(same, _NOTHING, logits)
    logits = tl.where((rows >= B)[:, None] | (at >= last)[None, :], _NOTHING, logits)
    own = (rows[:, None] == at[None, :] + own_start) & (at < own_count)[None, :]
    return tl.where(own, _NOTHING, logits)


@triton.jit
def _below(logits, ceiling, index, count, AXIS: tl.constexpr):
    """The logits with -inf where they are above the ceiling of their row (AXIS 0) or column (AXIS 1)."""
    if ceiling is not None:
        bound = tl.load(ceiling + index, index < count, float("inf"))
        logits = tl.where(logits > tl.expand_dims(bound, 1 - AXIS), _NOTHING, logits)
    return logits


@triton.jit
def _finite(maximum):
    return tl.where(maximum == _NOTHING, 0.0, maximum)


@triton.jit
def _place(row_tiles, column_tiles, M: tl.constexpr, N: tl.constexpr):
    """(row tile, its rows, column tile, its columns) of a program, of a grid (row_tiles * column_tiles,) in groups of
    a few row tiles: programs that run together read the same operands, which so stay in cache."""
    program = tl.program_id(0)
    i, j = program // column_tiles, program % column_tiles
    i, j = tl.swizzle2d(i, j, row_tiles, column_tiles, _GROUP)
    return i, i * M + tl.arange(0, M), j, j * N + tl.arange(0, N)


@triton.autotune(_CHOICES, **_TUNED)
@triton.jit(do_not_specialize=_SIZES)
def reduce(
    queries, candidates, row_ids, candidate_ids, row_ceiling, column_ceiling, scale, B, n, columns,
    own_start, own_count, maxima, totals, column_maxima, column_totals,
    D: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Each row over a tile of candidates, its maximum m and sum of 2^(l - m), to maxima, totals [column tiles, B]; each
    of the first `columns` candidates over a tile of rows, to column_maxima, column_totals [row tiles, columns]."""
    row_tile, rows, column_tile, at = _place(tl.cdiv(B, M), tl.cdiv(n, N), M, N)
    logits = _products(queries, candidates, rows, at, B, n, D, PRECISION, M, N, K) * scale
    logits = _masked(logits, rows, at, n, row_ids, candidate_ids, B, n, own_start, own_count, KEYS)
    by_row = _below(logits, row_ceiling, rows, B, 0)
    maximum = tl.max(by_row, 1)
    total = tl.sum(tl.exp2(by_row - _finite(maximum)[:, None]), 1)
    tl.store(maxima + column_tile * B + rows, maximum, rows < B)
    tl.store(totals + column_tile * B + rows, total, rows < B)
    if column_tile * N < columns:
        by_column = _below(logits, column_ceiling, at, columns, 1)
        of_column = tl.max(by_column, 0)
        tl.store(column_maxima + row_tile * columns + at, of_column, at < columns)
        sums = tl.sum(tl.exp2(by_column - _finite(of_column)[None, :]), 0)
        tl.store(column_totals + row_tile * columns + at, sums, at < columns)


@triton.autotune(_CHOICES, **_TUNED)
@triton.jit(do_not_specialize=[*_SIZES, "first", "last"])
def weigh(
    queries, candidates, row_ids, candidate_ids, row_ceiling, column_ceiling, scale, B, n, columns,
    own_start, own_count, first, last, weights, stride, row_anchor, row_factor, column_anchor, column_factor,
    maxima, totals, moved,
    D: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Weights [B, last - first] of candidates first..last, in the type of their second product, rows `stride` apart:

        w_ij = 2^(l_ij - row_anchor_i) row_factor_i + 2^(l_ij - column_anchor_j) column_factor_j     (j < columns)

    and each row's maximum and sum over the tile, to maxima, totals [column tiles, B]. With `moved` [B], only tiles
    that have a row marked there."""
    _, rows, column_tile, offset = _place(tl.cdiv(B, M), tl.cdiv(last - first, N), M, N)
    within = rows < B
    needed = True
    if moved is not None:
        needed = tl.max(tl.load(moved + rows, within, 0).to(tl.int32), 0) > 0
    if needed:
        at = first + offset
        logits = _products(queries, candidates, rows, at, B, n, D, PRECISION, M, N, K) * scale
        logits = _masked(logits, rows, at, last, row_ids, candidate_ids, B, n, own_start, own_count, KEYS)
        by_row = _below(logits, row_ceiling, rows, B, 0)
        weight = tl.exp2(by_row - tl.load(row_anchor + rows, within, 0.0)[:, None])
        if maxima is not None:
            tl.store(maxima + column_tile * B + rows, tl.max(by_row, 1), within)
            tl.store(totals + column_tile * B + rows, tl.sum(weight, 1), within)
        if row_factor is not None:
            weight *= tl.load(row_factor + rows, within, 0.0)[:, None]
        if column_anchor is not None:
            by_column = _below(logits, column_ceiling, at, columns, 1)
            anchor = tl.load(column_anchor + at, at < columns, float("inf"))
            factor = tl.load(column_factor + at, at < columns, 0.0)
            weight += tl.exp2(by_column - anchor[None, :]) * factor[None, :]
        place = weights + rows.to(tl.int64)[:, None] * stride + offset[None, :]
        tl.store(place, weight.to(weights.dtype.element_ty), within[:, None])


@triton.jit(do_not_specialize=["B", "tiles"])
def reanchor(
    maximum, anchor, total, values, moved, maxima, B, tiles, drift,
    D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Takes maxima [tiles, B] into each row's `maximum`, and where that is now further than `drift` from the row's
    anchor sets the anchor to it, marks the row in `moved`, and rescales its total and values [B, D].
    Grid: (row tiles,).

    An anchor moves down only before its row has met any candidate, when there is nothing to rescale."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    within = rows < B
    largest = tl.load(maximum + rows, within, _NOTHING)
    for tile in range(tiles):
        largest = tl.maximum(largest, tl.load(maxima + tile * B + rows, within, _NOTHING))
    tl.store(maximum + rows, largest, within)
    old = tl.load(anchor + rows, within, 0.0)
    moves = (tl.abs(largest - old) > drift) & (largest != _NOTHING)
    tl.store(moved + rows, moves.to(tl.int8), within)
    if tl.max(moves.to(tl.int32), 0) > 0:
        tl.store(anchor + rows, tl.where(moves, largest, old), within)
        decay = tl.where(moves, tl.exp2(tl.minimum(old - largest, 0.0)), 1.0)
        tl.store(total + rows, tl.load(total + rows, within, 0.0) * decay, within)
        for start in range(0, D, K):
            depth = start + tl.arange(0, K)
            place = values + rows.to(tl.int64)[:, None] * D + depth[None, :]
            inside = within[:, None] & (depth < D)[None, :]
            tl.store(place, tl.load(place, inside, 0.0) * decay[:, None], inside)
