"""What one query loses, from its positive's similarity and its reduced negatives: every variant of InfoNCE.

Of query i: l = s/t its positive's logit, D = log sum over its negatives of exp(logit), Z = log(exp l + exp D).

    InfoNCE                Z - l                                                   arXiv:1807.03748, eq. 4
    joint, n directions    log(n exp l + exp D) - l                                arXiv:2308.03281, eq. 3
    margins                l from s - m, or from cos(arccos s + m)                 arXiv:1801.09414, arXiv:1801.07698
    decoupled (DCL)        D - l                                                   arXiv:2110.06848, eq. 6
    DCLW                   D - w l,  w = 2 - exp(s/sigma) / mean exp(s/sigma)       arXiv:2110.06848, eq. 7
    label smoothing e      Z - (1-e) l - e mean of all logits                      arXiv:1512.00567, section 7
    several positives P    outside: Z - mean_P l;  inside: Z - log sum_P exp l     arXiv:2004.11362, eq. 2 and 3
    soft targets t         Z - (t_ii l + sum t_ij l_ij) / (t_ii + sum t_ij)        arXiv:2209.06638, its mechanism
    debiased, hard (HCL)   log(exp l + G) - l,                                     arXiv:2010.04592, eq. 4
                           G = max((N E - N tau+ exp l) / (1 - tau+), N exp(-1/t)),
                           N E = N sum exp((1+beta) logit) / sum exp(beta logit) over the N negatives;
                           beta = 0 is the debiased loss of arXiv:2007.00224

With several positives, or soft targets, Z holds all of them. The unit is nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainers.collectives import Group
from trainers.objectives.embedded import gather_scalars, share_of
from trainers.objectives.masks import HIDDEN, Mask
from trainers.objectives.reductions import Reduced, Targets, Wanted
from trainers.objectives.sections.contrastive import ContrastiveSection, Debiased


@dataclass(frozen=True)
class Side:
    """One direction of this worker's queries, or several with one denominator, in which the positive is once for each:
    pairs [b], similarity of each query and its positive; and its negatives; target [b], of its positive where targets
    are soft."""

    pairs: Tensor
    reduced: Reduced
    directions: int = 1
    target: Tensor | None = None

    @property
    def aimed(self) -> Tensor:
        """[b] bool: one of its targets isn't 0."""
        if self.target is None:
            return torch.ones_like(self.pairs, dtype=torch.bool)
        return self.target + self.reduced.target_weight > 0

    @property
    def compared(self) -> Tensor:
        """[b] bool: it has a negative, or another positive."""
        return ((self.reduced.denominators[0] != HIDDEN) | (self.reduced.target_weight > 0)) & self.aimed


class Logit:
    """Sums of logits, for label smoothing."""

    def value(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(logits == HIDDEN, 0)

    def slope(self, logits: Tensor) -> Tensor:
        return (logits != HIDDEN).to(logits.dtype)


def wanted(section: ContrastiveSection, weights: tuple[Mask, ...], targets: Targets | None) -> Wanted:
    """What the exchange must reduce for `losses`."""
    beta = section.debiased.concentration if section.debiased else 0.0
    return Wanted(
        scales=(1 + beta, beta) if beta else (1.0,),
        weights=weights,
        pointwise=Logit() if section.label_smoothing else None,
        targets=targets,
        soft=section.soft_targets is not None,
        count=section.debiased is not None,
    )


def losses(section: ContrastiveSection, side: Side, temperature: float | Tensor) -> Tensor:
    """[b] nats, 0 for a query with nothing to compare; without what `weighted_positives` adds to their sum."""
    positive = with_margin(section, side.pairs) / temperature
    reduced, negatives = side.reduced, side.reduced.denominators[0]
    if section.debiased:
        lost = softplus(debiased(section.debiased, reduced, positive, temperature) - positive)
    elif side.target is not None:
        whole = torch.where(side.aimed, side.target + reduced.target_weight, 1)
        expected = (reduced.target_sum + side.target * positive) / whole
        lost = softplus(negatives - positive) + positive - expected
    elif section.positives:
        together = torch.logaddexp(reduced.target_lse, positive)
        lost = softplus(negatives - together)
        if section.positives.sum == "outside":
            lost = lost + together - (reduced.target_sum + positive) / (reduced.target_weight + 1)
    else:
        times = math.log(side.directions)
        lost = negatives - positive if section.decoupled else softplus(negatives - positive - times) + times
        if section.label_smoothing:
            mean = (reduced.pointwise + positive) / (reduced.count + 1)
            lost = lost + section.label_smoothing * (positive - mean)
    return torch.where(side.compared, lost, 0)


def with_margin(section: ContrastiveSection, pairs: Tensor) -> Tensor:
    """The positives' similarities, made harder. The angle's margin stops at pi."""
    if section.angular_margin:
        inside = 1 - 4 * torch.finfo(pairs.dtype).eps  # the arc cosine has no slope at 1
        angle = pairs.clamp(-inside, inside).arccos() + section.angular_margin
        pairs = angle.clamp(max=math.pi).cos()
    return pairs - section.additive_margin


def debiased(section: Debiased, reduced: Reduced, positive: Tensor, temperature: float | Tensor) -> Tensor:
    """[b] log G."""
    count = reduced.count.clamp(min=1).log()
    expected = reduced.denominators[0]  # log N E
    if section.concentration:
        expected = expected - reduced.denominators[1].masked_fill(expected == HIDDEN, 0) + count
    taken = torch.as_tensor(section.positive_share, dtype=positive.dtype).log() + count + positive - expected
    below_one = -torch.finfo(positive.dtype).eps
    corrected = expected + torch.log1p(-taken.clamp(max=below_one).exp()) - math.log1p(-section.positive_share)
    floor = count - 1 / temperature
    return torch.where(expected == HIDDEN, expected, torch.maximum(corrected, floor))


def weighted_positives(
    section: ContrastiveSection, side: Side, temperature: float | Tensor, weights: Tensor, group: Group
) -> Tensor:
    """This worker's share of sum_i weights_i (1 - w_i) l_i over the batch, the gradient through w too: what DCLW adds
    to the sum of `losses`. w is a soft-max over the batch's pairs, so all workers compute it whole. Collective."""
    if section.von_mises_fisher is None:
        return side.pairs.new_zeros(())
    positive = with_margin(section, side.pairs) / temperature
    of_all = gather_scalars(torch.stack([side.pairs, positive, weights], 1), group)
    pairs, positive, weights = of_all.unbind(1)
    over_mean = len(pairs) * (pairs / section.von_mises_fisher).softmax(0)  # 2 - w
    return share_of((weights * (over_mean - 1) * positive).sum(), group)


def joined(*sides: Reduced | None) -> Reduced:
    """One reduction over the candidates of several."""
    there = [side for side in sides if side is not None]
    whole = there[0]
    for side in there[1:]:
        whole = Reduced(
            denominators=log_sum(whole.denominators, side.denominators),
            hardest=torch.maximum(whole.hardest, side.hardest),
            ties=whole.ties,
            count=whole.count + side.count,
            pointwise=whole.pointwise + side.pointwise,
            target_lse=log_sum(whole.target_lse, side.target_lse),
            target_sum=whole.target_sum + side.target_sum,
            target_weight=whole.target_weight + side.target_weight,
        )
    return whole


def log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b), -inf without gradient where both are."""
    nothing = (a == HIDDEN) & (b == HIDDEN)
    return torch.logaddexp(a.masked_fill(nothing, 0), b.masked_fill(nothing, 0)).masked_fill(nothing, HIDDEN)
