"""An objective on prefixes and on several layers equals the sum of its definitions, queue and workers included."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize

from data_services.schema import UsageError
from tests.trainers.objectives.naive import Whole, check, weighted_mean
from tests.twins import random_rows, random_shares
from trainers.collectives import Group
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.distill import EmbeddingDistill
from trainers.objectives.embedded import LossShare
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.distill import EmbeddingDistillSection
from trainers.objectives.sections.terms import AlignmentSection
from trainers.objectives.sections.wrappers import Layers, Matryoshka
from trainers.objectives.terms import Alignment
from trainers.objectives.wrappers import OverLayers, OverPrefixes, changed

DIM = 12
SPLITS = {"one": [(4, 6)], "two": [(3, 5), (2, 2)], "three, one idle": [(2, 4), (0, 0), (3, 3)]}
BASE = ContrastiveSection(temperature=0.2, directions="query_to_document", tile=3)


class InfoNCE:
    """The contrastive loss with no metric but itself."""

    learned = {}

    def __init__(self, group: Group) -> None:
        self._loss = Contrastive(BASE, group)

    def __call__(self, embedded):
        share = self._loss(embedded)
        return LossShare(share.loss, {"loss": share.metrics["loss"]})


def over_prefixes(section, group):
    return OverPrefixes(section, InfoNCE(group))


def over_layers(section, group):
    return OverLayers(section, 3, InfoNCE(group), group)


def over_both(section, group):
    layers, prefixes = section
    return OverLayers(layers, 3, OverPrefixes(prefixes, InfoNCE(group)), group)


def infonce(whole: Whole, view):
    """BASE of every vector x as view(x)."""
    documents = [(r, j, view(k)) for r, of_worker in enumerate(whole.documents) for j, k in enumerate(of_worker)]
    stored = [view(k) for rows in whole.queues.values() for k in rows.vectors]
    losses = []
    for r, i in whole:
        q, k = (view(x) for x in whole.pair(r, i, i))
        negatives = [other for w, j, other in documents if (w, j) != (r, i)] + stored
        logits = torch.stack([q @ x for x in (k, *negatives)]) / BASE.temperature
        losses.append(logits.logsumexp(0) - logits[0])
    return weighted_mean(whole, losses, [whole.weight(r, i) for r, i in whole])


def of_prefixes(whole: Whole, section: Matryoshka, learned, layer=lambda x: x):
    weights = section.weights or (1.0,) * len(section.dims)

    def prefix(x, dim):
        return layer(x) if dim == len(layer(x)) else normalize(layer(x)[:dim], dim=0)

    losses = {m: infonce(whole, lambda x, m=m: prefix(x, m)) for m in section.dims}
    loss = sum(w * losses[m] for m, w in zip(section.dims, weights, strict=True))
    return loss, {f"loss_dim_{m}": float(x) for m, x in losses.items()}


def of_layers(whole: Whole, section: Layers, learned, base=infonce):
    size, metrics = DIM // 3, {}
    views = [lambda x, v=v: x[v * size : (v + 1) * size] for v in range(3)]
    weights = (*(section.weights or (0.5, 0.5)), section.last_weight)
    losses = [base(whole, view) for view in views]
    loss = sum(w * x for w, x in zip(weights, losses, strict=True))
    metrics = {f"loss_layer_{v}": float(x) for v, x in enumerate(losses)}
    if section.kl_weight:
        texts, t, divergences = [*torch.cat([*whole.queries, *whole.documents])], section.kl_temperature, []
        for x in texts:
            target = (views[2](x).detach() / t).softmax(0)
            divergences += [(target * (target / (view(x) / t).softmax(0)).log()).sum() for view in views[:2]]
        metrics["layer_divergence"] = float(sum(divergences)) / len(texts)
        loss = loss + section.kl_weight * t * sum(divergences) / len(texts)
    return loss, metrics


def of_both(whole: Whole, section, learned):
    layers, prefixes = section
    loss, metrics = of_layers(whole, layers, learned, lambda w, view: of_prefixes(w, prefixes, learned, view)[0])
    last = of_prefixes(whole, prefixes, learned, lambda x: x[2 * DIM // 3 :])
    return loss, metrics | last[1]


def unit_layers(split):
    """Shares and queue rows whose vectors are three unit vectors side by side."""

    def thirds(x):
        return normalize(x.unflatten(-1, (3, DIM // 3)), dim=-1).flatten(-2)

    rows = random_rows(2, 7, DIM)
    shares = [changed(share, thirds) for share in random_shares(9, SPLITS[split], DIM)]
    return shares, {"documents": replace(rows, vectors=thirds(rows.vectors))}


@pytest.mark.parametrize("queued", [0, 7])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
def test_prefixes_are_normalised_weighted_and_added(gloo, split, weights, queued):
    section = Matryoshka(dims=(3, DIM, 7), weights=weights)
    queues = {"documents": random_rows(2, queued, DIM)} if queued else {}
    check(gloo, over_prefixes, section, of_prefixes, random_shares(9, SPLITS[split], DIM), queues)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "section",
    [Layers(), Layers(weights=(0.3, 0.9), last_weight=2.0, kl_weight=0.5, kl_temperature=1.5), Layers(kl_weight=0)],
    ids=["defaults", "weights", "no divergence"],
)
def test_layers_are_weighted_added_and_drawn_to_the_last(gloo, split, section):
    shares, queues = unit_layers(split)
    check(gloo, over_layers, section, of_layers, shares, queues)


def test_prefixes_of_layers_are_two_dimensional_matryoshka(gloo):
    shares, queues = unit_layers("two")
    section = Layers(kl_weight=2.0), Matryoshka(dims=(4, 2), weights=(1.0, 0.25))
    check(gloo, over_both, section, of_both, shares, queues)


def test_prefixes_of_the_momentum_encoders_vectors_are_taken_too(gloo):
    def distill(section, group):
        return OverPrefixes(section, EmbeddingDistill(EmbeddingDistillSection(of="queries"), group))

    share = random_shares(3, [(4, 5)], DIM)[0]
    found = distill(Matryoshka(dims=(DIM, 5)), Group())(share).metrics
    cosines = torch.cosine_similarity(share.queries[:, :5], share.momentum_queries[:, :5])
    expected = ((1 - cosines) * share.weights).sum() / share.weights.sum()
    assert found["loss_dim_5"] == pytest.approx(float(expected), rel=1e-9)


def test_prefixes_of_token_vectors_are_each_tokens_own():
    seen = []

    class Watch:
        learned = {}

        def __call__(self, embedded):
            seen.append(embedded.documents)
            return LossShare(embedded.queries.sum() * 0, {"loss": 0.0})

    share = random_shares(3, [(2, 3)], DIM, tokens=4)[0]
    OverPrefixes(Matryoshka(dims=(DIM, 5)), Watch())(share)
    assert seen[0] is share.documents
    torch.testing.assert_close(seen[1], normalize(share.documents[..., :5], dim=2))


def test_bfloat16_rows_of_the_queue_are_normalised_before_they_are_rounded():
    rows = random_rows(4, 50, 64)
    rows = replace(rows, vectors=rows.vectors.to(torch.bfloat16))
    share = replace(random_shares(3, [(2, 3)], 64)[0], queues={"documents": rows})
    seen = []

    class Watch:
        learned = {}

        def __call__(self, embedded):
            seen.append(embedded.queues["documents"].vectors)
            return LossShare(embedded.queries.sum() * 0, {"loss": 0.0})

    OverPrefixes(Matryoshka(dims=(64, 16)), Watch())(share)
    assert seen[0] is rows.vectors  # no copy of the queue for the whole vector
    exact = normalize(rows.vectors[:, :16].double(), dim=1)
    torch.testing.assert_close(seen[1], exact.to(torch.bfloat16), rtol=0, atol=0)


def test_what_the_base_learns_is_learned_from_every_prefix():
    section = ContrastiveSection(temperature={"start": 0.1})
    objective = OverPrefixes(Matryoshka(dims=(DIM, 5)), Contrastive(section, Group()))
    assert objective.learned == Contrastive(section, Group()).learned
    gradients = []
    for wrapped in (objective, *(_alone(section, dim) for dim in (DIM, 5))):
        learned = {k: torch.tensor(v, requires_grad=True) for k, v in objective.learned.items()}
        wrapped(replace(random_shares(3, [(4, 6)], DIM)[0], learned=learned)).loss.backward()
        gradients.append(learned["log_temperature"].grad)
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2])


def _alone(section, dim):
    cut = partial(changed, change=lambda x: normalize(x[..., :dim], dim=-1))
    return lambda embedded: Contrastive(section, Group())(cut(embedded))


def test_dims_that_leave_the_whole_vector_untrained_or_pass_it_are_refused():
    share, base = random_shares(3, [(2, 3)], DIM)[0], Alignment(AlignmentSection(), Group())
    for dims in ((4, 6), (6, DIM + 1)):
        message = rf"matryoshka\.dims: the largest is {max(dims)} and the model's vectors have {DIM}"
        with pytest.raises(UsageError, match=message):
            OverPrefixes(Matryoshka(dims=dims), base)(share)


def test_layers_that_do_not_fit_the_vectors_are_refused():
    share, base, group = random_shares(3, [(2, 3)], DIM)[0], Alignment(AlignmentSection(), Group()), Group()
    with pytest.raises(UsageError, match=r"layers: the model gives the vectors of one layer.*model\.layers"):
        OverLayers(Layers(), 1, base, group)
    with pytest.raises(UsageError, match=r"layers\.weights: 1 of them for 2 earlier layers"):
        OverLayers(Layers(weights=(1.0,)), 3, base, group)
    with pytest.raises(ValueError, match="12 dimensions on the last axis, which 5 layers don't divide"):
        OverLayers(Layers(), 5, base, group)(share)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Matryoshka, {"dims": (0, 4)}, "different numbers greater than 0"),
        (Matryoshka, {"dims": (4, 4)}, "different numbers greater than 0"),
        (Matryoshka, {"dims": (4, 8), "weights": (1.0,)}, "1 weights for 2 dims"),
        (Matryoshka, {"dims": (4,), "weights": (-1.0,)}, "none may be negative"),
        (Layers, {"weights": (0.5, -1.0)}, "none may be negative"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(section, values, message):
    with pytest.raises(ValidationError, match=message):
        section(**values)
