"""The same inputs give the same loss and gradients as Sentence Transformers' losses, to 1e-6."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sentence_transformers.cross_encoder import losses as list_losses
from sentence_transformers.sentence_transformer import losses as pair_losses
from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric
from torch import nn
from torch.nn.functional import normalize

from tests.twins import random_shares
from trainers.collectives import Group
from trainers.objectives.graded import Angle, Cosent
from trainers.objectives.listwise import LambdaRank, ListMLE, ListNet, RankNet
from trainers.objectives.pairwise import Triplet
from trainers.objectives.sections.graded import (
    AngleSection,
    CosentSection,
    LambdaRankSection,
    ListMLESection,
    ListNetSection,
    RankNetSection,
)
from trainers.objectives.sections.pairwise import TripletSection

DIM = 8


def pairs(b: int, d: int):
    """(a batch in float32 without weights, the leaves of its embeddings: vectors of any length, as some of their
    losses normalise what they are given)."""
    (share,) = random_shares(11, [(b, d)], DIM)
    leaves = [(3 * x.float()).requires_grad_() for x in (share.queries, share.documents)]
    queries, documents = (normalize(x, dim=1) for x in leaves)
    return replace(share, queries=queries, documents=documents, weights=None), leaves


def assert_equal(ours, theirs, leaves, tolerance=1e-6):
    """Two losses and their gradients in the leaves."""
    assert float(ours) == pytest.approx(float(theirs), rel=tolerance, abs=tolerance)
    of_ours = torch.autograd.grad(ours, leaves, retain_graph=True)
    for found, expected in zip(of_ours, torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("objective", "section", "released"),
    [
        (Cosent, CosentSection(temperature=1 / 20), pair_losses.CoSENTLoss),
        (Angle, AngleSection(temperature=1 / 20), pair_losses.AnglELoss),
    ],
)
@pytest.mark.parametrize("grades", [5, 10**6], ids=["ties", "no ties"])
def test_all_graded_pairs(objective, section, released, grades):
    share, leaves = pairs(12, 12)
    generator = torch.Generator().manual_seed(3)
    share = replace(share, scores=torch.randint(grades, (12,), generator=generator) / grades)
    ours = objective(section, Group())(share).loss
    theirs = released(None, scale=20.0).compute_loss_from_embeddings([share.queries, share.documents], share.scores)
    assert_equal(ours, theirs, leaves)


@pytest.mark.parametrize(
    ("similarity", "metric"),
    [("distance", TripletDistanceMetric.EUCLIDEAN), ("inner_product", TripletDistanceMetric.COSINE)],
)
def test_triplets(similarity, metric):
    share, leaves = pairs(6, 12)
    share = replace(share, owners=torch.arange(6).repeat(2))
    section = TripletSection(mining="own", similarity=similarity, margin=0.4)
    ours = Triplet(section, Group())(share).loss
    columns = [share.queries, share.documents[:6], share.documents[6:]]
    theirs = pair_losses.TripletLoss(None, metric, 0.4).compute_loss_from_embeddings(columns, None)
    assert_equal(ours, theirs, leaves)


class Logits(nn.Module):
    """What the cross-encoder losses call a model, its logits given."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def preprocess(self, texts: list, **settings) -> dict:
        return {"texts": torch.zeros(len(texts))}

    def forward(self, tokens: dict) -> dict:
        return {"scores": self.logits}


LN2 = 0.6931471805599453


@pytest.mark.parametrize(
    ("objective", "section", "released", "ratio"),
    [
        (ListMLE, ListMLESection(temperature=0.5), partial(list_losses.ListMLELoss, respect_input_order=False), 1),
        (ListNet, ListNetSection(temperature=0.5), list_losses.ListNetLoss, 1),
        # theirs: logarithms to base 2, and the mean over pairs where nDCG's bounds are sums over them
        (RankNet, RankNetSection(temperature=0.5), list_losses.RankNetLoss, LN2),
        (
            LambdaRank,
            LambdaRankSection(temperature=0.5, top=3),
            partial(list_losses.LambdaLoss, weighting_scheme=list_losses.LambdaRankScheme(), k=3),
            LN2 * 12,
        ),
        (
            LambdaRank,
            LambdaRankSection(temperature=0.5, bound="ndcg2++"),
            partial(list_losses.LambdaLoss, weighting_scheme=list_losses.NDCGLoss2PPScheme()),
            LN2 * 15,
        ),
    ],
    ids=["listmle", "listnet", "ranknet", "lambdarank", "ndcg2++"],
)
def test_lists(objective, section, released, ratio):
    grades = torch.tensor([3.0, 1.0, 4.0, 0.0, 2.0, 5.0])
    share, leaves = pairs(1, 6)
    share = replace(share, scores=grades)
    logits = share.documents @ share.queries[0] / 0.5
    ours = objective(section, Group())(share).loss
    theirs = released(Logits(logits), mini_batch_size=6)([["query"], [["document"] * 6]], [grades])
    assert_equal(ours, theirs * ratio, leaves)
