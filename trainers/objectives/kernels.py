"""One block of the exchange on a GPU: the same sums as sharded_softmax.py, in Triton where a matrix product must not
reach memory and in torch's own products where it is the fastest there is. The tiles are in kernels_triton.py.

Shapes: queries [B, D], candidates [n, D], l_ij = q_i . k_j / temperature, i and j compared unless a mask hides them.

Forward. A program takes one tile of pairs and leaves the maximum m and the sum of exp(l_ij - m) of each of its rows
and, where they are wanted, columns; those of all tiles are merged at the end (Milakov & Gimelshein, arXiv:1805.02867).
They take 1/32 and 1/16 of a byte per pair, where a logit would take two or four.

Values, sum_j exp(l_ij - m_i) k_j of a queue's rows, and the backward pass need a second product, whose D columns of
accumulators no register file holds beyond D = 256. So the weights, exp(l_ij - anchor_i), go through memory, at most
`WEIGHTS_BYTES` of them at a time and in 16 bits where the operands have 16, and the second product is torch's own.

A row's maximum isn't known while its weights are made. Its anchor is at first 0, and moves to the maximum only when
they are more than 2^64 apart: less neither overflows nor loses a bit. The tiles concerned are then made again. With
logits within +-44 that never happens, and a queue costs two products, as attention does.

Backward. Weights p_ij dL/drow_i + c_ij dL/dcol_j, chunk by chunk, then both products from them: three in all, one of
them recomputation, where a kernel for each gradient would take four.

Precision. Products are of the candidates' type with float32 accumulation: exact logits of 16-bit operands, weights
rounded to bfloat16 (relative error 2^-9); of float32 operands tf32x3, which is float32 to 1e-6, unless
`torch.set_float32_matmul_precision` allows tf32. A run that computes in bfloat16 gives both sides so: fresh vectors are
rounded to it, and so is a copy of a queue's float32 rows, which a queue of bfloat16 doesn't need.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trainers.objectives.kernel_pairs import MASKS, WEIGHT_TYPES, Pairs
from trainers.objectives.masks import Mask
from trainers.objectives.reductions import Wanted, finite
from trainers.objectives.similarity import InnerProduct, Similarity

WEIGHTS_BYTES = 2**28
"""The most that one chunk of weights [B, t] takes in memory."""

_LOG2_E = math.log2(math.e)
_DRIFT = 64.0  # in base 2; see above. float32 and bfloat16 reach from 2^-126 to 2^127, and a sum has 2^40 terms at most
_ACCUMULATES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)  # addmm of 16 bits into 32


def usable(vectors: Tensor, score: Similarity, masks: Sequence[Mask], wanted: Wanted) -> bool:
    """Whether these kernels reduce a block of `vectors`: inner products on a GPU with 16-bit tensor cores (compute
    capability 8.0), masked by ids, classes and ceilings, reduced to a plain log-sum-exp."""
    return (
        type(score) is InnerProduct
        and wanted.plain
        and not (wanted.weights or wanted.counts)
        and all(isinstance(mask, MASKS) for mask in masks)
        and vectors.dtype in WEIGHT_TYPES
        and find_spec("triton") is not None
        and (_capable(vectors.device) or os.environ.get("TRITON_INTERPRET") == "1")
    )


@dataclass
class Partial:
    """One block's part of what is reduced; -inf, 0 and 0 where every pair is hidden.

    maximum, total [B]               m_i = max_j l_ij and sum_j exp(l_ij - m_i)
    values [B, D]                    sum_j exp(l_ij - m_i) k_j; None where not asked for
    column_maximum, column_total [c] the same of the first c candidates, over rows
    All float32.
    """

    maximum: Tensor
    total: Tensor
    values: Tensor | None
    column_maximum: Tensor
    column_total: Tensor


@torch.no_grad()
def forward_block(pairs: Pairs, *, columns: int = 0, values: bool = False) -> Partial:
    """Reduces rows, and the first `columns` candidates over rows, or rows and their `values`: not both at once."""
    if values and columns:
        raise ValueError(f"values and {columns} columns of one block: stored candidates have no columns")
    if columns > len(pairs.candidates):
        raise ValueError(f"{columns} columns of {len(pairs.candidates)} candidates on axis 0")
    return _with_values(pairs) if values else _reduced(pairs, columns)


@torch.no_grad()
def backward_block(
    pairs: Pairs,
    row: Tensor,
    row_upstream: Tensor,
    query_gradient: Tensor,
    column: Tensor | None = None,
    column_upstream: Tensor | None = None,
) -> Tensor:
    """The candidates' gradient [n, D], complete, and the block's part of the queries', added to `query_gradient` [B, D]
    in place; both float32.

    row, row_upstream [B]        the log-sum-exp over all blocks of all workers, and dL/drow
    column, column_upstream [c]  of the first c candidates, over all rows; None: columns weren't reduced

    The temperature's is -sum_j k_j . dL/dk_j / temperature, since sum_ij dL/dl_ij l_ij = sum_j k_j . dL/dk_j.
    """
    scale = 1 / pairs.temperature
    gradient = query_gradient.new_zeros(pairs.candidates.shape)
    if gradient.numel() == 0 or pairs.rows == 0:
        return gradient
    of_columns = {}
    if column is not None and column_upstream is not None:
        of_columns = {"column_anchor": finite(column) * _LOG2_E, "column_factor": column_upstream.float() * scale}
    anchor, factor = finite(row) * _LOG2_E, row_upstream.float() * scale
    columns, n = 0 if column is None else len(column), len(pairs.candidates)
    weights = _Weights(pairs, columns)
    queries = pairs.queries.to(weights.dtype)
    for chunk in (*weights.chunks(0, columns), *weights.chunks(columns, n)):
        more = of_columns if chunk.start < columns else {}
        made = weights.make(chunk, row_anchor=anchor, row_factor=factor, **more)
        _multiply(made.T, queries, gradient[chunk], add=False)
        _multiply(made, pairs.candidates[chunk].to(weights.dtype), query_gradient, add=True)
    return gradient


def _reduced(pairs: Pairs, columns: int) -> Partial:
    new = _new(pairs)
    rows, n = pairs.rows, len(pairs.candidates)
    if rows == 0 or n == 0:
        nothing = [new(size).fill_(value) for size in (rows, columns) for value in (-torch.inf, 0)]
        return Partial(nothing[0], nothing[1], None, nothing[2], nothing[3])
    arguments = _arguments(pairs, columns)
    row_tiles, column_tiles = _cuts(rows, arguments["M"]), _cuts(n, arguments["N"])
    maxima, totals = new(column_tiles, rows), new(column_tiles, rows)
    column_maxima, column_totals = new(row_tiles, columns), new(row_tiles, columns)
    _triton().reduce[(row_tiles * column_tiles,)](
        **arguments,
        maxima=maxima,
        totals=totals,
        column_maxima=column_maxima,
        column_totals=column_totals,
    )
    maximum, total = _merged(maxima, totals)
    return Partial(maximum, total, None, *_merged(column_maxima, column_totals))


def _merged(maxima: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum, in natural logarithms again, and the sum of partial ones [parts, n]."""
    maximum = maxima.amax(0)
    return maximum / _LOG2_E, (totals * (maxima - finite(maximum)).exp2_()).sum(0)


def _with_values(pairs: Pairs) -> Partial:
    new = _new(pairs)
    rows, width = pairs.queries.shape
    maximum, anchor, total = new(rows).fill_(-torch.inf), new(rows).zero_(), new(rows).zero_()
    values, moved = new(rows, width).zero_(), new(rows, dtype=torch.int8)
    if rows and len(pairs.candidates):
        weights = _Weights(pairs)
        maxima, totals = new(weights.tiles, rows), new(weights.tiles, rows)
        row_tile = weights.arguments["M"]
        for chunk in weights.chunks(0, len(pairs.candidates)):
            tiles = _cuts(chunk.stop - chunk.start, weights.arguments["N"])
            made = weights.make(chunk, row_anchor=anchor, maxima=maxima, totals=totals)
            _triton().reanchor[(_cuts(rows, row_tile),)](
                maximum, anchor, total, values, moved, maxima, rows, tiles, _DRIFT, D=width, M=row_tile, K=32
            )
            weights.make(chunk, row_anchor=anchor, maxima=maxima, totals=totals, moved=moved)
            total += totals[:tiles].sum(0)
            _multiply(made, pairs.candidates[chunk].to(weights.dtype), values, add=True)
    scale = (anchor - finite(maximum)).exp2_()
    return Partial(maximum / _LOG2_E, total * scale, values.mul_(scale[:, None]), new(0), new(0))


def _arguments(pairs: Pairs, columns: int) -> dict[str, Any]:
    """What every kernel is given."""
    queries, candidates = pairs.queries.to(pairs.candidates.dtype).contiguous(), pairs.candidates.contiguous()
    if _triton().INTERPRETED and candidates.dtype == torch.bfloat16:
        queries, candidates = queries.float(), candidates.float()  # the interpreter multiplies bfloat16's raw bits
    ids = (pairs.row_ids, pairs.candidate_ids)
    row_ids, candidate_ids = (None if x is None else x.contiguous() for x in ids)
    own = pairs.own or slice(0, 0)
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {
        "queries": queries,
        "candidates": candidates,
        "row_ids": row_ids,
        "candidate_ids": candidate_ids,
        "row_ceiling": None if pairs.row_ceiling is None else pairs.row_ceiling.float() * _LOG2_E,
        "column_ceiling": None if pairs.column_ceiling is None else pairs.column_ceiling.float() * _LOG2_E,
        "scale": _LOG2_E / pairs.temperature,
        "B": pairs.rows,
        "n": len(candidates),
        "columns": columns,
        "own_start": own.start,
        "own_count": own.stop - own.start,
        "D": candidates.shape[1],
        "KEYS": 0 if row_ids is None else len(row_ids),
        "PRECISION": precision,
        **_triton().tile_shape(candidates.element_size()),
    }


class _Weights:
    """Weights [B, t] of a block's candidates, a chunk after the other in one buffer."""

    def __init__(self, pairs: Pairs, columns: int = 0) -> None:
        self.arguments = _arguments(pairs, columns)
        self.dtype = pairs.weight_type
        tile = self.arguments["N"]
        fitting = max(1, WEIGHTS_BYTES // (pairs.rows * tile * self.dtype.itemsize))
        self.tiles = min(fitting, _cuts(len(pairs.candidates), tile))
        self._buffer = pairs.queries.new_empty(pairs.rows, self.tiles * tile, dtype=self.dtype)

    def chunks(self, first: int, last: int) -> Iterator[slice]:
        """The candidates first..last."""
        width = self._buffer.shape[1]
        return (slice(at, min(at + width, last)) for at in range(first, last, width))

    def make(self, chunk: slice, **of_kernel: Tensor) -> Tensor:
        """Weights [B, t] of a chunk, valid until the next is made; see `kernels_triton.weigh`."""
        optional = "row_factor", "column_anchor", "column_factor", "maxima", "totals", "moved"
        width = chunk.stop - chunk.start
        _triton().weigh[(_cuts(len(self._buffer), self.arguments["M"]) * _cuts(width, self.arguments["N"]),)](
            **self.arguments,
            **(dict.fromkeys(optional) | of_kernel),
            first=chunk.start,
            last=chunk.stop,
            weights=self._buffer,
            stride=self._buffer.shape[1],
        )
        return self._buffer[:, :width]


def _multiply(left: Tensor, right: Tensor, into: Tensor, *, add: bool) -> None:
    """into = left @ right, or += where `add`, from operands of 16 or 32 bits with float32 accumulation."""
    if left.dtype == into.dtype or not left.is_cuda:
        into.addmm_(left.to(into.dtype), right.to(into.dtype), beta=float(add))
    elif not add:
        torch.mm(left, right, out_dtype=into.dtype, out=into)
    elif _ACCUMULATES:
        torch.addmm(into, left, right, out_dtype=into.dtype, out=into)
    else:
        into.add_(torch.mm(left, right, out_dtype=into.dtype))


def _new(pairs: Pairs) -> Callable[..., Tensor]:
    return partial(pairs.queries.new_empty, dtype=torch.float32)


def _cuts(length: int, size: int) -> int:
    """Pieces of at most `size`."""
    return -(-length // size)


def _capable(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _triton() -> ModuleType:
    """Imported where it is used: a machine without a GPU mostly has no Triton."""
    return import_module("trainers.objectives.kernels_triton")
