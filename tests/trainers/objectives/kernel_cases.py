"""A case for the kernels, fresh and stored candidates of one worker, its dense float64 twin, and their comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainers.objectives import kernels
from trainers.objectives.kernel_pairs import Pairs
from trainers.objectives.keys import UNKNOWN
from trainers.objectives.reductions import finite

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # weights are bfloat16


@dataclass(frozen=True)
class Case:
    """B rows, `fresh` candidates with columns for the first `own` of them, `stored` ones, ids below `distinct`.

    With `ceilings`, rows and columns have some; row 0 is never compared; the length of vectors grows from `shortest`
    to `longest` over the candidates, so that later ones score further out.
    """

    B: int
    fresh: int
    stored: int
    D: int
    own: int = 0
    dtype: torch.dtype = torch.float32
    temperature: float = 0.1
    distinct: int = 40
    ceilings: bool = False
    shortest: float = 1.0
    longest: float = 1.0
    seed: int = 0
    device: str = "cpu"

    def blocks(self) -> tuple[Pairs, Pairs]:
        """The fresh and the stored candidates."""
        generator = torch.Generator().manual_seed(self.seed)
        n = self.fresh + self.stored

        def ids(rows: int) -> Tensor:
            drawn = torch.randint(self.distinct, (2, rows), generator=generator) + 2**40
            drawn[1, ::3] = UNKNOWN
            return drawn

        def vectors(rows: int) -> Tensor:
            return normalize(torch.randn(rows, self.D, generator=generator), dim=1)

        queries, row_ids, candidate_ids = vectors(self.B), ids(self.B), ids(n)
        candidates = vectors(n) * torch.linspace(self.shortest, self.longest, n)[:, None]
        if self.B:
            row_ids[0, 0] = 7  # of every candidate
        every = torch.full((1, n), 7)
        row_ids = torch.cat([row_ids, row_ids[:1]])
        candidate_ids = torch.cat([candidate_ids, every])
        ceiling = [torch.rand(size, generator=generator) / self.temperature for size in (self.B, self.fresh)]
        row_ceiling, column_ceiling = ceiling if self.ceilings else (None, None)
        start = self.B - self.own
        common = {"queries": queries.to(self.dtype), "temperature": self.temperature, "row_ceiling": row_ceiling}
        first = slice(0, self.fresh), slice(self.fresh, n)
        own = slice(start, start + self.own), None
        made = []
        for cut, rows, ceilings in zip(first, own, (column_ceiling, None), strict=True):
            given = common | {
                "candidates": candidates[cut].to(self.dtype),
                "row_ids": row_ids,
                "candidate_ids": candidate_ids[:, cut],
                "column_ceiling": ceilings,
            }
            on_device = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in given.items()}
            made.append(Pairs(**on_device, own=rows))
        return made[0], made[1]


def dense(pairs: Pairs, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, n] as rows and as columns see them, hidden pairs -inf, one pair of ids at a time."""
    logits = queries @ candidates.T / pairs.temperature
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    for of_row, of_candidate in zip(pairs.row_ids, pairs.candidate_ids, strict=True):
        hidden |= (of_row[:, None] == of_candidate[None]) & (of_row != UNKNOWN)[:, None]
    if pairs.own is not None:
        for j in range(pairs.own.stop - pairs.own.start):
            hidden[pairs.own.start + j, j] = True
    rows, columns = logits.masked_fill(hidden, -torch.inf), logits.masked_fill(hidden, -torch.inf)
    if pairs.row_ceiling is not None:
        rows = rows.masked_fill(logits > pairs.row_ceiling[:, None].double(), -torch.inf)
    if pairs.column_ceiling is not None:
        columns = columns.masked_fill(logits > pairs.column_ceiling.double(), -torch.inf)
    return rows, columns


def check_chunk_by_chunk(case: Case) -> None:
    """With weights one tile wide: as many chunks as there are tiles."""
    most, kernels.WEIGHTS_BYTES = kernels.WEIGHTS_BYTES, 1
    try:
        check(case)
    finally:
        kernels.WEIGHTS_BYTES = most


def check(case: Case) -> None:
    """Reductions and gradients of both blocks against the twin: L = sum_i u_i row_i + sum_j v_j column_j, over rows and
    columns that have anything to compare."""
    fresh, stored = case.blocks()
    generator = torch.Generator().manual_seed(case.seed + 1)
    u, v = (torch.randn(size, generator=generator).to(case.device) for size in (case.B, case.own))
    tolerance = TOLERANCES[case.dtype]

    q = fresh.queries.to(case.dtype).double().requires_grad_()
    k = fresh.candidates.double().requires_grad_()
    by_row, by_column = dense(fresh, q, k)
    of_stored = dense(stored, q, stored.candidates.double())[0]
    logits, by_column = torch.cat([by_row, of_stored], 1), by_column[:, : case.own]
    furthest = float(logits.nan_to_num(neginf=0.0).abs().max()) if logits.numel() else 0.0
    tolerance = max(tolerance, furthest * 2**-22)  # what a float32 logit is known to
    some, some_columns = logits.isfinite().any(1), by_column.isfinite().any(0)
    row = torch.full_like(u, -torch.inf, dtype=torch.float64)
    row[some] = logits[some].logsumexp(1)
    column = torch.full_like(v, -torch.inf, dtype=torch.float64)
    column[some_columns] = by_column[:, some_columns].logsumexp(0)
    total = (row[some] * u[some]).sum() + (column[some_columns] * v[some_columns]).sum()
    total.backward()

    first = kernels.forward_block(fresh, columns=case.own)
    second = kernels.forward_block(stored, values=True)
    found = torch.logaddexp(first.maximum + first.total.log(), second.maximum + second.total.log())
    found_column = first.column_maximum + first.column_total.log()
    for part, twin in ((first, by_row), (second, of_stored)):
        maxima = twin.amax(1) if twin.shape[1] else torch.full_like(row, -torch.inf)
        torch.testing.assert_close(part.maximum.double(), maxima.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.double(), row.detach(), rtol=1e-5, atol=1e-4 + tolerance / 10)
    torch.testing.assert_close(found_column.double(), column.detach(), rtol=1e-5, atol=1e-4)

    gradient = second.values * (u / case.temperature * (second.maximum - finite(found)).exp())[:, None]
    of_fresh = kernels.backward_block(fresh, found, u, gradient, found_column, v)
    for ours, twin in ((gradient, q.grad), (of_fresh, k.grad)):
        largest = float(twin.abs().max()) if twin.numel() else 0.0
        torch.testing.assert_close(ours.double(), twin, rtol=0, atol=tolerance * max(largest, 1e-6))
    of_temperature = (fresh.candidates.double() * of_fresh).sum(), (k * k.grad).sum().detach()
    torch.testing.assert_close(*of_temperature, rtol=0, atol=tolerance * (1e-6 + float((k * k.grad).abs().sum())))
