"""Distillation equals its definitions at any split over workers, and says what it lacks."""

from dataclasses import replace

import pytest
import torch

from data_services.schema import UsageError
from tests.trainers.objectives.naive import Whole, check, similarity, weighted_mean
from tests.twins import in_type, random_shares
from trainers.collectives import Group
from trainers.objectives.distill import EmbeddingDistill, KLDistill, MarginMSE, SimilarityDistill
from trainers.objectives.sections.distill import (
    EmbeddingDistillSection,
    KLDistillSection,
    MarginMSESection,
    SimilarityDistillSection,
)

DIM = 6
# (b, d) of each worker: uneven, one without further documents, one with nothing
SPLITS = {"one": [(5, 12)], "two": [(4, 9), (2, 2)], "three, one idle": [(3, 8), (0, 0), (2, 3)]}


def margin_mse(whole: Whole, section: MarginMSESection, learned):
    errors, weights = [], []
    for r, i in whole:
        scores = whole.shares[r].scores
        for j in whole.own(r, i):
            if j != i and not scores[[i, j]].isnan().any():
                (q, k), (_, other) = whole.pair(r, i, i), whole.pair(r, i, j)
                own = similarity("inner_product", q, k) - similarity("inner_product", q, other)
                errors.append((section.scale * own - (scores[i] - scores[j])).square())
                weights.append(whole.weight(r, i))
    return weighted_mean(whole, errors, weights), {"margins": float(len(errors))}


def kl_distill(whole: Whole, section: KLDistillSection, learned):
    losses, weights, alone, t = [], [], 0, section.temperature
    for r, i in whole:
        own = [j for j in whole.own(r, i) if not whole.shares[r].scores[j].isnan()]
        alone += len(own) < 2
        if len(own) > 1:
            similarities = [similarity("inner_product", *whole.pair(r, i, j)) for j in own]
            student = (torch.stack(similarities) / t).softmax(0)
            teacher = (whole.shares[r].scores[own] / section.teacher_temperature).softmax(0)
            losses.append(t**2 * (teacher * (teacher / student).log()).sum())
            weights.append(whole.weight(r, i))
    return weighted_mean(whole, losses, weights), {"nothing_to_compare": float(alone)}


def embedding_distill(whole: Whole, section: EmbeddingDistillSection, learned):
    def distance(x, m):
        return 1 - x @ m / (x.norm() * m.norm()) if section.distance == "cosine" else (x - m).square().sum() / DIM

    losses, weights = [], []
    for r, i in whole:
        share = whole.shares[r]
        if section.of != "documents":
            losses.append(distance(whole.queries[r][i], share.momentum_queries[i]))
            weights.append(whole.weight(r, i))
        for j in whole.own(r, i) if section.of != "queries" else ():
            losses.append(distance(whole.documents[r][j], share.momentum_documents[j]))
            weights.append(whole.weight(r, i))
    return weighted_mean(whole, losses, weights), {}


def similarity_distill(whole: Whole, section: SimilarityDistillSection, learned):
    documents = torch.cat(whole.documents)
    teachers = torch.cat([share.momentum_documents for share in whole.shares])
    losses, weights = [], []
    for r, i in whole:
        teacher = (teachers @ whole.shares[r].momentum_queries[i] / section.teacher_temperature).softmax(0)
        student = (documents @ whole.queries[r][i] / section.temperature).log_softmax(0)
        losses.append(-(teacher * student).sum())
        weights.append(whole.weight(r, i))
    return weighted_mean(whole, losses, weights), {}


@pytest.fixture(params=SPLITS)
def shares(request):
    return random_shares(3, SPLITS[request.param], DIM)


def test_margin_mse_is_the_mean_over_all_workers_margins(gloo, shares):
    (metrics, *_) = check(gloo, MarginMSE, MarginMSESection(scale=3.0), margin_mse, shares)
    assert metrics["margins"] == sum(len(share.documents) - len(share.queries) for share in shares)


def test_kl_distill_is_the_mean_over_queries_with_several_documents(gloo, shares):
    check(gloo, KLDistill, KLDistillSection(temperature=0.3, teacher_temperature=0.7), kl_distill, shares)


@pytest.mark.parametrize("of", ["queries", "documents", "both"])
@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_embedding_distill_is_the_mean_over_texts(gloo, shares, distance, of):
    section = EmbeddingDistillSection(distance=distance, of=of)
    check(gloo, EmbeddingDistill, section, embedding_distill, shares)


@pytest.mark.parametrize("tile", [2, 4096])
def test_similarity_distill_is_the_cross_entropy_over_all_workers_documents(gloo, shares, tile):
    section = SimilarityDistillSection(temperature=0.2, teacher_temperature=0.1, tile=tile)
    check(gloo, SimilarityDistill, section, similarity_distill, shares)


def test_without_weights_pairs_count_the_same(gloo):
    shares = [replace(share, weights=None) for share in random_shares(8, SPLITS["two"], DIM)]
    check(gloo, MarginMSE, MarginMSESection(), margin_mse, shares)
    check(gloo, KLDistill, KLDistillSection(), kl_distill, shares)
    check(gloo, EmbeddingDistill, EmbeddingDistillSection(), embedding_distill, shares)
    check(gloo, SimilarityDistill, SimilarityDistillSection(), similarity_distill, shares)


def test_a_teacher_whose_exponentials_leave_float32_is_followed():
    """At a temperature of 0.005 logits reach 200, and exp(200) is beyond float32."""
    share = random_shares(4, SPLITS["one"], DIM)[0]
    section = SimilarityDistillSection(temperature=0.1, teacher_temperature=0.005)
    single = in_type(share, torch.float32)
    found = SimilarityDistill(section, Group())(replace(single, queries=single.queries.requires_grad_()))
    found.loss.backward()
    whole = Whole([share], {})
    expected, _ = similarity_distill(whole, section, {})
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(expected, whole.queries)
    torch.testing.assert_close(single.queries.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_documents_without_a_score_are_left_out_and_counted(gloo):
    shares = random_shares(5, [(3, 8), (2, 5)], DIM)
    shares[0].scores[5] = torch.nan  # a further document
    shares[1].scores[0] = torch.nan  # a positive: the query has no margins, but the rest of its list
    (metrics, *_) = check(gloo, MarginMSE, MarginMSESection(), margin_mse, shares)
    assert 0 < metrics["margins"] < 8
    check(gloo, KLDistill, KLDistillSection(), kl_distill, shares)


def test_a_batch_with_nothing_to_compare_costs_nothing(gloo):
    shares = random_shares(6, [(2, 2), (1, 1)], DIM)
    (metrics, *_) = check(gloo, MarginMSE, MarginMSESection(), margin_mse, shares)
    assert metrics == {"loss": 0.0, "margins": 0.0}
    (metrics, *_) = check(gloo, KLDistill, KLDistillSection(), kl_distill, shares)
    assert metrics == {"loss": 0.0, "nothing_to_compare": 3.0}


def test_scores_are_distilled_into_token_vectors(gloo):
    """Late interaction: the similarity is the sum of maxima over valid tokens."""
    shares = random_shares(7, SPLITS["two"], DIM, tokens=4)
    check(gloo, MarginMSE, MarginMSESection(), margin_mse, shares)
    check(gloo, KLDistill, KLDistillSection(temperature=1.0), kl_distill, shares)


@pytest.mark.parametrize(
    ("objective", "section"), [(MarginMSE, MarginMSESection()), (KLDistill, KLDistillSection())], ids=str
)
def test_missing_scores_are_named_with_the_key_that_gives_them(objective, section):
    share = replace(random_shares(1, [(2, 3)], DIM)[0], scores=None)
    with pytest.raises(UsageError, match=rf"{section.kind} needs a score of each.*data\.sources\.positive_scores"):
        objective(section, Group())(share)


@pytest.mark.parametrize(
    ("objective", "section"),
    [(EmbeddingDistill, EmbeddingDistillSection()), (SimilarityDistill, SimilarityDistillSection())],
    ids=str,
)
def test_missing_momentum_vectors_are_named_with_the_key_that_gives_them(objective, section):
    share = random_shares(1, [(2, 3)], DIM)[0]
    with pytest.raises(UsageError, match=rf"{section.kind} needs the batch's vectors by the momentum.*momentum\.decay"):
        objective(section, Group())(replace(share, momentum_documents=None))
    tokens = replace(share, queries=torch.zeros(2, 4, DIM), documents=torch.zeros(3, 4, DIM))
    with pytest.raises(ValueError, match=r"one vector a text \[b, D\], queries are token vectors \[2, 4, 6\]"):
        objective(section, Group())(tokens)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    share = random_shares(2, [(4, 7)], DIM)[0]
    share = replace(share, momentum_queries=share.queries.clone(), momentum_documents=share.documents.clone())
    vectors = [share.queries.requires_grad_(), share.documents.requires_grad_()]
    for loss in (
        EmbeddingDistill(EmbeddingDistillSection(), Group())(share).loss,
        SimilarityDistill(SimilarityDistillSection(), Group())(share).loss,
    ):
        for x, gradient in zip(vectors, torch.autograd.grad(loss, vectors), strict=True):
            assert gradient.norm() < 1e-9 * x.norm()


def test_a_teachers_vectors_stand_in_the_place_of_the_momentum_encoders():
    share = random_shares(3, SPLITS["one"], DIM)[0]
    given = {"teacher_queries": share.momentum_queries, "teacher_documents": share.momentum_documents}
    taught = replace(share, momentum_queries=None, momentum_documents=None, **given)
    for loss, section in ((EmbeddingDistill, EmbeddingDistillSection), (SimilarityDistill, SimilarityDistillSection)):
        own, other = (loss(section(teacher=of), Group())(x).loss for of, x in (("momentum", share), ("data", taught)))
        assert own == other
        with pytest.raises(UsageError, match=r"needs a teacher's vectors.*data\.teacher\.model"):
            loss(section(teacher="data"), Group())(share)
    wide = replace(taught, **{name: torch.cat([x, x], 1) for name, x in given.items()})
    section = SimilarityDistillSection(teacher="data", teacher_temperature=0.1)
    once = SimilarityDistill(section.model_copy(update={"teacher_temperature": 0.05}), Group())(taught).loss
    torch.testing.assert_close(SimilarityDistill(section, Group())(wide).loss, once)  # twice the inner products
    with pytest.raises(UsageError, match="6 dimensions with a teacher's of 12: take similarity_distill"):
        EmbeddingDistill(EmbeddingDistillSection(teacher="data"), Group())(wide)
