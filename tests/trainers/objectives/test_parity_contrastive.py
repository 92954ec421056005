"""Losses equal those of Sentence Transformers on the same vectors, to 1e-6, gradients included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainers.collectives import Group
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.distill import EmbeddingDistill, KLDistill, MarginMSE
from trainers.objectives.embedded import Embedded, Objective
from trainers.objectives.keys import UNKNOWN, Keys
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.distill import EmbeddingDistillSection, KLDistillSection, MarginMSESection
from trainers.objectives.sections.terms import SpreadOutSection
from trainers.objectives.sections.wrappers import Layers, Matryoshka
from trainers.objectives.terms import SpreadOut
from trainers.objectives.wrappers import OverLayers, OverPrefixes

peer = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

ROWS, DIM, NEGATIVES = 7, 12, 2
UNMASKED = {"temperature": 1 / 20, "mask_same_document": False, "mask_same_query": False}
DIRECTIONS = {
    "query to document": (
        {},
        {"directions": "query_to_document"},
    ),
    "both, each with its soft-max": (
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"directions": "both"},
    ),
    "queries among themselves": (
        {"directions": ("query_to_doc", "query_to_query")},
        {"directions": "query_to_document", "normalisation": "joint", "among_queries": True},
    ),
    "hardness": (
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
        {"directions": "query_to_document", "harder": 5.0 / 20},
    ),
}
# Both directions in one soft-max, where the peer has the positive twice. The last two compare pairs only: the peer's
# documents meet hard negatives too.
JOINT = {
    "both": (
        2,
        {"directions": ("query_to_doc", "doc_to_query")},
        {"normalisation": "joint"},
    ),
    "documents among themselves": (
        0,
        {"directions": ("query_to_doc", "doc_to_query", "doc_to_doc")},
        {"normalisation": "joint", "among_documents": True},
    ),
    "GTE": (
        0,
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        {"normalisation": "joint", "among_queries": True, "among_documents": True},
    ),
}


class Table(nn.Module):
    """In the place of a model: text number i has row i as its vector."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.rows[features["input_ids"][:, 0]]}

    def get_embedding_dimension(self) -> int:
        return self.rows.shape[1]

    def __getitem__(self, module: int) -> nn.Module:
        return nn.Identity()


@dataclass(frozen=True)
class Columns:
    """Rows [n columns * ROWS, DIM]: the queries, their positives, then each further document of all queries."""

    rows: Tensor
    negatives: int

    @classmethod
    def draw(cls, negatives: int) -> Columns:
        rows = torch.randn((2 + negatives) * ROWS, DIM, generator=torch.Generator().manual_seed(negatives)).double()
        return cls(rows, negatives)

    @property
    def features(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": ids[:, None]} for ids in torch.arange(len(self.rows)).split(ROWS)]

    def theirs(self, make, labels=None) -> tuple[float, Tensor]:
        """(loss, dL/drows) of make(model)."""
        table = Table(self.rows)
        loss = make(table)(self.features, labels)
        loss = sum(loss.values()) if isinstance(loss, dict) else loss
        loss.backward()
        return loss.item(), table.rows.grad

    def ours(self, objective: Objective, unit: bool = True, **known: Tensor) -> tuple[float, Tensor]:
        """(loss, dL/drows); `unit` normalises the rows first, as the peer's cosine does."""
        rows = self.rows.clone().requires_grad_()
        queries, documents = (normalize(rows, dim=1) if unit else rows).split([ROWS, len(rows) - ROWS])
        ids = torch.arange(len(rows))
        answers = torch.full((len(documents),), UNKNOWN)
        answers[:ROWS] = ids[:ROWS]
        share = objective(
            Embedded(
                queries=queries,
                documents=documents,
                query_keys=Keys(ids[:ROWS], ids[ROWS : 2 * ROWS]),
                document_keys=Keys(answers, ids[ROWS:]),
                owners=torch.arange(ROWS).repeat(1 + self.negatives),
                global_queries=ROWS,
                **known,
            )
        )
        share.loss.backward()
        assert share.loss.item() == pytest.approx(share.metrics["loss"], rel=1e-9)
        return share.loss.item(), rows.grad


def assert_equal(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-9)


def contrastive(settings) -> Contrastive:
    return Contrastive(ContrastiveSection.model_validate(UNMASKED | settings), Group())


def ranking(cached: bool):
    """The peer's InfoNCE, plain or with gradient caching in chunks that don't divide the batch."""
    if cached:
        return partial(peer.CachedMultipleNegativesRankingLoss, mini_batch_size=3)
    return peer.MultipleNegativesRankingLoss


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("negatives", [0, NEGATIVES])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_multiple_negatives_ranking(direction, negatives, cached):
    theirs, ours = DIRECTIONS[direction]
    columns = Columns.draw(negatives)
    assert_equal(columns.ours(contrastive(ours)), columns.theirs(partial(ranking(cached), **theirs)))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("direction", JOINT)
def test_multiple_negatives_ranking_in_one_soft_max(direction, cached):
    negatives, theirs, ours = JOINT[direction]
    columns = Columns.draw(negatives)
    assert_equal(columns.ours(contrastive(ours)), columns.theirs(partial(ranking(cached), **theirs)))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("weights", [None, (1.0, 0.3, 2.0)])
def test_matryoshka_around_it(weights, cached):
    columns, dims = Columns.draw(NEGATIVES), (DIM, 8, 3)
    theirs = columns.theirs(lambda model: peer.MatryoshkaLoss(model, ranking(cached)(model), dims, weights))
    base = contrastive({"directions": "query_to_document"})
    assert_equal(columns.ours(OverPrefixes(Matryoshka(dims=dims, weights=weights), base)), theirs)


@pytest.mark.parametrize(("weighting", "weights"), [("uniform", None), ("linear", (1 / 2, 1 / 4))])
def test_adaptive_layers_around_it(weighting, weights):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.util import dot_score

    columns, layers = Columns.draw(NEGATIVES), 3
    table = layered(columns.rows.unflatten(1, (layers, -1)).transpose(0, 1))
    model = SentenceTransformer(modules=[table, Pooling(DIM // layers)], device="cpu")
    loss = peer.AdaptiveLayerLoss(
        model,
        peer.MultipleNegativesRankingLoss(model, similarity_fct=dot_score),
        n_layers_per_step=-1,
        last_layer_weight=1.5,
        kl_div_weight=0.7,
        kl_temperature=0.4,
        layer_weighting=weighting,
    )
    ones = {"attention_mask": torch.ones(ROWS, 1).double()}
    theirs = loss([features | ones for features in columns.features], None)
    theirs.backward()
    section = Layers(weights=weights, last_weight=1.5, kl_weight=0.7, kl_temperature=0.4)
    ours = OverLayers(section, layers, contrastive({"directions": "query_to_document"}), Group())
    gradient = table.rows.grad.transpose(0, 1).flatten(1)
    assert_equal(columns.ours(ours, unit=False), (theirs.item(), gradient))


def layered(rows: Tensor) -> nn.Module:
    """In the place of a transformer of one token: text number i has rows [layers, n, width] at i in its layers."""
    from sentence_transformers.base.modules import Transformer

    class Layered(Transformer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.rows = nn.Parameter(rows.clone())
            self.model = SimpleNamespace(config=SimpleNamespace(output_hidden_states=False))

        def forward(self, features, **_):
            states = self.rows[:, features["input_ids"]]
            features |= {"token_embeddings": states[-1], "all_layer_embeddings": tuple(states)}
            return features

    return Layered()


def test_margin_mse():
    columns, scores = Columns.draw(NEGATIVES), 3 * torch.randn(ROWS, 1 + NEGATIVES).double()
    ours = columns.ours(MarginMSE(MarginMSESection(), Group()), unit=False, scores=scores.T.reshape(-1))
    assert_equal(ours, columns.theirs(peer.MarginMSELoss, scores))


def test_kl_distillation():
    columns, scores = Columns.draw(NEGATIVES), torch.randn(ROWS, 1 + NEGATIVES).double()
    section = KLDistillSection(temperature=0.7, teacher_temperature=0.4)
    ours = columns.ours(KLDistill(section, Group()), unit=False, scores=scores.T.reshape(-1))
    theirs = partial(peer.DistillKLDivLoss, student_temperature=0.7, teacher_temperature=0.4)
    assert_equal(ours, columns.theirs(theirs, scores))


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_embedding_distillation(distance):
    columns, teacher = Columns.draw(NEGATIVES), Columns.draw(NEGATIVES + 1).rows[: (2 + NEGATIVES) * ROWS]
    objective = EmbeddingDistill(EmbeddingDistillSection(distance=distance), Group())
    momentum = {"momentum_queries": teacher[:ROWS], "momentum_documents": teacher[ROWS:]}
    labels = teacher.view(2 + NEGATIVES, ROWS, DIM).transpose(0, 1)
    theirs = columns.theirs(partial(peer.EmbedDistillLoss, distance_metric=distance), labels)
    assert_equal(columns.ours(objective, unit=False, **momentum), theirs)


def test_global_orthogonal_regularisation():
    columns = Columns.draw(0)
    objective = SpreadOut(SpreadOutSection(first_moment=0.7, second_moment=2.0), Group())
    theirs = partial(peer.GlobalOrthogonalRegularizationLoss, mean_weight=0.7, second_moment_weight=2.0)
    assert_equal(columns.ours(objective), columns.theirs(theirs))
