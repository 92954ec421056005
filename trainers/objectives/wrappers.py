"""Any objective on several views of the same vectors: on their prefixes, or on what several layers give.

A view is a change of every vector that an objective sees: of queries, documents, the momentum encoder's and the queue's
rows. A weighted sum of shares is a share of the weighted sum, so wrappers need to know nothing of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, softmax

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.objectives.embedded import Embedded, LossShare, Objective
from trainers.objectives.sections.wrappers import Layers, Matryoshka
from trainers.objectives.terms import mean_over_workers, one_vector_a_text


class OverPrefixes:
    """Matryoshka: an objective on each of several prefixes of the vectors, normalised again.

        L = w_D L_base(x) + sum_{m < D} w_m L_base(x[:m] / |x[:m]|)

    Vectors x [n, D], or token vectors [n, L, D], each with its own prefix. The metrics are those of the whole vector;
    `loss` is the sum and `loss_dim_m` the base's at each m. Prefixes of the queue's rows are made anew for each loss:
    k m numbers beside its k D on this worker.
    Source: Kusupati et al., Matryoshka Representation Learning, arXiv:2205.13147, eq. 1.
    """

    def __init__(self, section: Matryoshka, base: Objective) -> None:
        weights = section.weights or (1.0,) * len(section.dims)
        # The widest first: its metrics are the ones that stay.
        self._prefixes = sorted(zip(section.dims, weights, strict=True), reverse=True)
        self._base, self.learned = base, base.learned

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective, as is the backward of the result. Raises UsageError where `dims` don't end at the vectors' D."""
        width, widest = embedded.queries.shape[-1], self._prefixes[0][0]
        if widest != width:
            raise UsageError(
                f"matryoshka.dims: the largest is {widest} and the model's vectors have {width} dimensions, "
                f"which would not be trained as a whole; make the largest {width}"
            )
        shares = [self._base(changed(embedded, _prefix(dim))) for dim, _ in self._prefixes]
        return _summed(shares, self._prefixes, "loss_dim")


class OverLayers:
    """An objective on the vectors of several layers, of which the earlier ones also follow the last.

        L = w_V L_base(x_V) + sum_{v < V} [w_v L_base(x_v) + a t KL_v]
        KL_v = mean_i sum_c p_ic (log p_ic - log p'_ic),   p_i = softmax_c(x_Vi / t),  p'_i = softmax_c(x_vi / t)

    Vectors [n, V D], those of the V layers side by side, the last layer's at the end; i runs over queries and documents
    of all workers, c over the D components; w_v are `weights`, w_V is `last_weight`, a `kl_weight` and t
    `kl_temperature`. The last layer teaches and gets no gradient of KL_v.

    The metrics are those of the last layer; `loss` is the sum, `loss_layer_v` the base's at each v (0 the earliest) and
    `layer_divergence` the sum of KL_v. Source: Li et al., 2D Matryoshka Sentence Embeddings, arXiv:2402.14776; with
    these weights Sentence Transformers' `AdaptiveLayerLoss`.
    """

    def __init__(self, section: Layers, layers: int, base: Objective, group: Group) -> None:
        earlier = layers - 1
        if earlier < 1:
            raise UsageError("layers: the model gives the vectors of one layer; name the layers in model.layers")
        weights = section.weights or (1 / earlier,) * earlier
        if len(weights) != earlier:
            raise UsageError(
                f"layers.weights: {len(weights)} of them for {earlier} earlier layers in model.layers; give one each"
            )
        self._weights = (*weights, section.last_weight)
        self._section, self._base, self._group, self.learned = section, base, group, base.learned

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective, as is the backward of the result. Raises ValueError where the vectors aren't of so many layers,
        or with `kl_weight` one vector a token."""
        count, width = len(self._weights), embedded.queries.shape[-1]
        if width % count:
            raise ValueError(f"vectors have {width} dimensions on the last axis, which {count} layers don't divide")
        order = list(enumerate(self._weights))[::-1]
        shares = [self._base(changed(embedded, _part(layer, width // count))) for layer, _ in order]
        total = _summed(shares, order, "loss_layer")
        return self._with_divergence(total, embedded) if self._section.kl_weight else total

    def _with_divergence(self, total: LossShare, embedded: Embedded) -> LossShare:
        one_vector_a_text(embedded, self)
        temperature, texts = self._section.kl_temperature, torch.cat([embedded.queries, embedded.documents])
        *earlier, last = (texts / temperature).chunk(len(self._weights), 1)
        target = softmax(last.detach(), 1)
        entropy = (target * log_softmax(last.detach(), 1)).sum(1)
        each = [entropy - (target * log_softmax(layer, 1)).sum(1) for layer in earlier]
        mean = mean_over_workers(torch.stack(each).sum(0), None, self._group)
        weight = self._section.kl_weight * temperature
        metrics = {"loss": total.metrics["loss"] + weight * mean.value, "layer_divergence": mean.value}
        return LossShare(total.loss + weight * mean.share, total.metrics | metrics)


def changed(embedded: Embedded, change: Callable[[Tensor], Tensor]) -> Embedded:
    """The same batch with every vector x [..., D] replaced by change(x)."""

    def of(vectors: Tensor | None) -> Tensor | None:
        return None if vectors is None else change(vectors)

    return replace(
        embedded,
        queries=change(embedded.queries),
        documents=change(embedded.documents),
        momentum_queries=of(embedded.momentum_queries),
        momentum_documents=of(embedded.momentum_documents),
        queues={name: replace(rows, vectors=change(rows.vectors)) for name, rows in embedded.queues.items()},
    )


def _prefix(dim: int) -> Callable[[Tensor], Tensor]:
    def cut(vectors: Tensor) -> Tensor:
        if vectors.shape[-1] == dim:  # a unit vector already, and the queue's rows needn't be copied
            return vectors
        wide = torch.promote_types(vectors.dtype, torch.float32)
        return normalize(vectors[..., :dim].to(wide), dim=-1).to(vectors.dtype)

    return cut


def _part(layer: int, width: int) -> Callable[[Tensor], Tensor]:
    return lambda vectors: vectors[..., layer * width : (layer + 1) * width]


def _summed(shares: Sequence[LossShare], weighted: Sequence[tuple[int, float]], name: str) -> LossShare:
    """The sum of shares under weights, each known by a number; the first share's metrics stay."""
    weights = [weight for _, weight in weighted]
    metrics = {f"{name}_{n}": share.metrics["loss"] for share, (n, _) in zip(shares, weighted, strict=True)}
    metrics["loss"] = sum(weight * share.metrics["loss"] for share, weight in zip(shares, weights, strict=True))
    loss = torch.stack([weight * share.loss for share, weight in zip(shares, weights, strict=True)]).sum()
    return LossShare(loss, shares[0].metrics | metrics)
