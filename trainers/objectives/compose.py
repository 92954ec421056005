"""A recipe's whole objective: one loss or several, weighted, around which views of the vectors may lie.

    L = sum_k w_k(progress) L_k        each L_k on the vectors, on their prefixes, or on those of several layers

A weighted sum of shares is a share of the weighted sum, so nothing here needs to know of workers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trainers.collectives import Group
from trainers.objectives.embedded import Embedded, LossShare, Objective
from trainers.objectives.sections.numbers import Term, value_at
from trainers.objectives.sections.wrappers import GradedWeights, Layers, Matryoshka

LOSSES = {
    "contrastive": "contrastive:Contrastive",
    "sigmoid": "pairwise:Sigmoid",
    "triplet": "pairwise:Triplet",
    "energy_hinge": "pairwise:EnergyHinge",
    "cosent": "graded:Cosent",
    "angle": "graded:Angle",
    "listmle": "listwise:ListMLE",
    "listnet": "listwise:ListNet",
    "ranknet": "listwise:RankNet",
    "lambdarank": "listwise:LambdaRank",
    "margin_mse": "distill:MarginMSE",
    "kl_distill": "distill:KLDistill",
    "embedding_distill": "distill:EmbeddingDistill",
    "similarity_distill": "distill:SimilarityDistill",
    "alignment": "terms:Alignment",
    "uniformity": "terms:Uniformity",
    "spread_out": "terms:SpreadOut",
    "koleo": "terms:KoLeo",
}
"""The class of each kind; a new loss is a section in config.py, a class, and a line here."""


def loss_class(section: Any) -> Callable[[Any, Group], Objective]:
    module, _, name = LOSSES[section.kind].partition(":")
    return getattr(importlib.import_module(f"trainers.objectives.{module}"), name)


class Sum:
    """The weighted sum of `terms`, of which the first gives its metrics under their own names; the others' begin
    with their kind, and `loss` is the sum's.

    make  the class of a term's section, the package's own where nothing else is said
    """

    def __init__(
        self,
        terms: Sequence[Term],
        group: Group,
        graded: GradedWeights | None = None,
        make: Callable[[Any], Callable[[Any, Group], Objective]] = loss_class,
    ) -> None:
        self._sections, self._graded = terms, graded
        self._losses = [make(section)(section, group) for section in terms]
        self.learned: Mapping[str, float] = {
            f"{i}.{name}": start for i, loss in enumerate(self._losses) for name, start in loss.learned.items()
        }

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective, as is the backward of the result."""
        if self._graded is not None:
            from trainers.objectives.graded import graded_weights

            embedded = graded_weights(self._graded, embedded)
        total, whole = None, 0.0
        metrics: dict[str, float] = {}
        for i, (section, loss) in enumerate(zip(self._sections, self._losses, strict=True)):
            own = {name.partition(".")[2]: x for name, x in embedded.learned.items() if name.startswith(f"{i}.")}
            share, weight = loss(replace(embedded, learned=own)), value_at(section.weight, embedded.progress)
            total = weight * share.loss if total is None else total + weight * share.loss
            whole += weight * share.metrics["loss"]
            metrics |= share.metrics if i == 0 else {f"{self._name(i)}_{k}": v for k, v in share.metrics.items()}
        assert total is not None, "there is at least one term"
        if len(self._losses) > 1:
            metrics["main_loss"] = metrics["loss"]
        return LossShare(total, metrics | {"loss": whole})

    def _name(self, index: int) -> str:
        """The term's kind, with its place in `terms` where an earlier one is of the same kind."""
        kinds = [getattr(section, "kind", "custom") for section in self._sections]
        return kinds[index] if kinds.index(kinds[index]) == index else f"{kinds[index]}_{index}"


def with_views(
    base: Objective, group: Group, matryoshka: Matryoshka | None, layers: Layers | None, layer_count: int
) -> Objective:
    """The objective on prefixes of the vectors, and on those of several layers, where a recipe asks."""
    from trainers.objectives.wrappers import OverLayers, OverPrefixes

    base = OverPrefixes(matryoshka, base) if matryoshka else base
    return OverLayers(layers, layer_count, base, group) if layers else base


def sides_compared(terms: Sequence[Term]) -> frozenset[str]:
    """The sides of a batch whose momentum encodings the terms compare."""
    return frozenset({"queries", "documents"} if any(term.needs_momentum for term in terms) else ())
