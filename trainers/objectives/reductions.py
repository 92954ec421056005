"""What is kept of each row's logits while tiles go by, how workers' parts merge, and the slope of it all.

For row i with candidates j that no mask hides, logits l_ij and targets t_ij >= 0 (positives met among candidates):

    denominators[s]_i = log sum_j w_ij^s exp(s l_ij)    for each scale s; w_ij the weights, constants
    hardest_i         = max_j l_ij
    pointwise_i       = sum_j f(l_ij)
    target_lse_i      = log sum_j t_ij exp(l_ij)
    target_sum_i      = sum_j t_ij l_ij,     target_weight_i = sum_j t_ij

An empty logarithm is -inf, an empty sum 0. A tile is taken in once and overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainers.collectives import Group
from trainers.device import fast_bf16
from trainers.objectives.keys import Keys
from trainers.objectives.masks import HIDDEN, Mask


class Pointwise(Protocol):
    """A function of one logit, summed over negatives; at -inf, a hidden candidate, both must be 0."""

    def value(self, logits: Tensor) -> Tensor: ...

    def slope(self, logits: Tensor) -> Tensor: ...


class Targets(Protocol):
    """The weights with which candidates are positives of a row."""

    def of(self, these: Keys, others: Keys, dtype: torch.dtype) -> Tensor:
        """[n, m] of t_ij >= 0."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What is reduced (formulas above).

    hardest  whether its gradient is wanted; its value always comes
    targets  of positives: candidates with a target leave the denominators
    soft     they stay in them, their target saying how much of a positive they are; what a mask hides has none, and
             target_lse isn't reduced
    count    whether the number of candidates that were compared is wanted
    """

    scales: tuple[float, ...] = (1.0,)
    weights: tuple[Mask, ...] = ()
    hardest: bool = False
    pointwise: Pointwise | None = None
    targets: Targets | None = None
    soft: bool = False
    count: bool = False

    @property
    def together(self) -> bool:
        """Whether the positives' exponentials are summed, apart from the denominators."""
        return self.targets is not None and not self.soft

    @property
    def plain(self) -> bool:
        """Nothing with a gradient but one log-sum-exp."""
        return self.scales == (1.0,) and not (self.hardest or self.pointwise or self.targets)

    @property
    def counts(self) -> bool:
        """Whether sums beside the exponentials' are kept, which a plain soft-max doesn't need."""
        return self.count or self.hardest or self.pointwise is not None


@dataclass
class Seen:
    """One tile as the reduction of one side sees it, [n, m] each.

    logits    hidden entries -inf
    weighted  the same with the weights' logarithms added (the same tensor where there are none)
    targets, raw   t_ij, and the logits before anything was hidden; None where no targets are wanted
    """

    logits: Tensor
    weighted: Tensor
    targets: Tensor | None = None
    raw: Tensor | None = None


class Running:
    """The state of n rows. `values` [n, D] is the sum of the weighted exponentials times the candidate."""

    def __init__(self, wanted: Wanted, like: Tensor, rows: int, width: int | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return like.new_zeros(*shape)

        self.wanted = wanted
        self.anchor = like.new_full((rows,), HIDDEN)  # the largest weighted logit so far
        self.totals = zeros(len(wanted.scales), rows)  # sum exp(s (l - anchor))
        self.values = None if width is None else zeros(rows, width)
        self.hardest = like.new_full((rows,), HIDDEN) if wanted.weights else self.anchor
        self.ties = zeros(rows)
        self.count = zeros(rows)
        self.pointwise = zeros(rows)
        self.target_anchor = like.new_full((rows,), HIDDEN)
        self.target_total, self.target_sum, self.target_weight = zeros(rows), zeros(rows), zeros(rows)

    def add(self, seen: Seen, candidates: Tensor | None = None) -> None:
        """Takes a tile in; seen.weighted is overwritten. candidates [m, D] where values are kept."""
        if self.wanted.counts:
            self.count.add_((seen.logits != HIDDEN).sum(1))
        if self.wanted.pointwise is not None:
            self.pointwise.add_(self.wanted.pointwise.value(seen.logits).sum(1))
        if self.wanted.hardest:
            self._add_ties(seen.logits)
        if self.wanted.weights:
            self.hardest = torch.maximum(self.hardest, seen.logits.amax(1))
        if seen.targets is not None and seen.raw is not None:
            self._add_targets(seen.targets, seen.raw)
        self._add_exponentials(seen.weighted, candidates)

    def _add_exponentials(self, weighted: Tensor, candidates: Tensor | None) -> None:
        maximum = torch.maximum(self.anchor, weighted.amax(1))
        anchor = finite(maximum)
        shift = self.anchor - anchor
        from_anchor = weighted.sub_(anchor[:, None])
        for i, scale in enumerate(self.wanted.scales):
            last = i == len(self.wanted.scales) - 1
            terms = from_anchor if scale == 1 else (from_anchor.mul_(scale) if last else from_anchor * scale)
            terms = terms.exp_() if last or scale != 1 else terms.exp()
            self.totals[i].mul_((shift * scale).exp_()).add_(terms.sum(1))
        if self.values is not None:
            assert candidates is not None
            self.values.mul_(shift.exp_()[:, None]).add_(product(terms, candidates))
        if not self.wanted.weights:
            self.hardest = maximum
        self.anchor = maximum

    def _add_ties(self, logits: Tensor) -> None:
        largest = logits.amax(1)
        ties = ((logits == largest[:, None]) & (logits != HIDDEN)).sum(1).to(self.ties.dtype)
        self.ties = torch.where(largest > self.hardest, ties, self.ties + ties * (largest == self.hardest))

    def _add_targets(self, targets: Tensor, raw: Tensor) -> None:
        if self.wanted.together:
            logs = raw + targets.log()
            maximum = torch.maximum(self.target_anchor, logs.amax(1))
            anchor = finite(maximum)
            self.target_total.mul_((self.target_anchor - anchor).exp_()).add_(logs.sub_(anchor[:, None]).exp_().sum(1))
            self.target_anchor = maximum
        self.target_sum.add_((targets * raw).sum(1))
        self.target_weight.add_(targets.sum(1))


@dataclass
class Reduced:
    """The result for n rows; see the formulas above.

    denominators [S, n]; hardest, pointwise, target_lse, target_sum, target_weight, count [n]; ties [n], how many
    share the maximum. count is 0 where it wasn't wanted.
    """

    denominators: Tensor
    hardest: Tensor
    ties: Tensor
    count: Tensor
    pointwise: Tensor
    target_lse: Tensor
    target_sum: Tensor
    target_weight: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return self.denominators, self.hardest, self.pointwise, self.target_lse, self.target_sum

    def __getitem__(self, rows: slice) -> Reduced:
        return Reduced(**{name: value[..., rows].clone() for name, value in vars(self).items()})


def merge(states: Sequence[Running], group: Group | None) -> tuple[Reduced, Tensor]:
    """(the reduction of all states of all workers, [blocks, n] each state's part of the first denominator). One
    all-reduce for maxima and one for sums; none without a group. Collective."""
    wanted = states[0].wanted
    maxima = [_largest([s.anchor for s in states])]
    if wanted.weights:
        maxima.append(_largest([s.hardest for s in states]))
    if wanted.together:
        maxima.append(_largest([s.target_anchor for s in states]))
    stacked = torch.stack(maxima)
    stacked = group.all_reduce(stacked, "max") if group else stacked
    top = stacked[0]
    hardest = stacked[1] if wanted.weights else top
    target_anchor = finite(stacked[-1]) if wanted.together else torch.zeros_like(top)

    anchor, scales = finite(top), wanted.scales
    sums = [s.totals[i] * ((s.anchor - anchor) * scale).exp() for s in states for i, scale in enumerate(scales)]
    if wanted.counts:
        sums += [sum_of([s.count for s in states]), sum_of([s.pointwise for s in states])]
        sums.append(sum_of([s.ties * (s.hardest == hardest) for s in states]))
    if wanted.together:
        sums.append(sum_of([s.target_total * (s.target_anchor - target_anchor).exp() for s in states]))
    if wanted.targets:
        sums += [sum_of([s.target_sum for s in states]), sum_of([s.target_weight for s in states])]
    merged = torch.stack(sums)
    merged = group.all_reduce(merged) if group else merged

    n = len(states) * len(scales)
    totals, rest = merged[:n].view(len(states), len(scales), -1), merged[n:]
    shift = anchor * top.new_tensor(scales)[:, None]
    zero = torch.zeros_like(top)
    count, pointwise, ties = rest[:3] if wanted.counts else (zero, zero, zero)
    target_sum, target_weight = rest[-2:] if wanted.targets else (zero, zero)
    target_total = rest[-3] if wanted.together else zero
    reduced = Reduced(
        denominators=totals.sum(0).log_() + shift,
        hardest=hardest,
        ties=ties,
        count=count,
        pointwise=pointwise,
        target_lse=target_total.log() + target_anchor,
        target_sum=target_sum,
        target_weight=target_weight,
    )
    return reduced, totals[:, 0].log() + shift[0]


def slopes(wanted: Wanted, seen: Seen, reduced: Reduced, upstream: Reduced) -> Tensor:
    """[n, m] dL/dlogits of one tile, from dL/d(each differentiable part of `reduced`)."""
    total: Tensor | None = None
    for i, scale in enumerate(wanted.scales):
        scaled = seen.weighted if scale == 1 else seen.weighted * scale
        part = (scaled - finite(reduced.denominators[i])[:, None]).exp_()
        part.mul_(scale * upstream.denominators[i][:, None])
        total = part if total is None else total.add_(part)
    assert total is not None, "there is at least one scale"
    if wanted.hardest:
        share = (upstream.hardest / reduced.ties.clamp(min=1))[:, None]
        total.add_((seen.logits == reduced.hardest[:, None]) * (seen.logits != HIDDEN) * share)
    if wanted.pointwise is not None:
        total.add_(wanted.pointwise.slope(seen.logits) * upstream.pointwise[:, None])
    if seen.targets is not None and seen.raw is not None:
        part = upstream.target_sum[:, None].expand_as(seen.raw)
        if wanted.together:
            likely = (seen.raw - finite(reduced.target_lse)[:, None]).exp_()
            part = likely.mul_(upstream.target_lse[:, None]).add_(part)
        total.add_(part * seen.targets)
    return total


def finite(logarithm: Tensor) -> Tensor:
    """The logarithm, or 0 where it is that of an empty sum: something safe to subtract from -inf."""
    return logarithm.masked_fill(logarithm == HIDDEN, 0)


def product(weights: Tensor, candidates: Tensor) -> Tensor:
    """weights [n, m] times candidates [m, D]: in the candidates' own type where the hardware multiplies it."""
    narrow = candidates.dtype != torch.bfloat16 or fast_bf16(candidates.device)
    return weights.to(candidates.dtype) @ candidates if narrow else weights @ candidates.to(weights.dtype)


def _largest(of: list[Tensor]) -> Tensor:
    return torch.stack(of).amax(0)


def sum_of(of: list[Tensor]) -> Tensor:
    return torch.stack(of).sum(0)
