"""Losses over graded documents equal their definitions, pair by pair, at any split over workers."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.functional import softplus

from data_services.schema import UsageError
from tests.trainers.objectives.naive import PROGRESS, Whole, check, similarity, weighted_mean
from tests.twins import in_type, random_shares
from trainers.collectives import Group
from trainers.objectives.graded import Angle, Cosent, graded_weights
from trainers.objectives.listwise import LambdaRank, ListMLE, ListNet, RankNet
from trainers.objectives.sections.graded import (
    AngleSection,
    CosentSection,
    LambdaRankSection,
    ListMLESection,
    ListNetSection,
    RankNetSection,
)
from trainers.objectives.sections.numbers import value_at
from trainers.objectives.sections.wrappers import GradedWeights

DIM = 6
# (b, d) of each worker: uneven, one with nothing; queries with one document and with several
SPLITS = {"one": [(4, 15)], "two": [(3, 9), (2, 2)], "three, one idle": [(2, 7), (0, 0), (3, 8)]}
LISTWISE = {
    "listmle": (ListMLE, ListMLESection(temperature=0.4)),
    "listmle, scheduled": (ListMLE, ListMLESection(temperature={"start": 1, "end": 0.2})),
    "listnet": (ListNet, ListNetSection(temperature=0.4, grade_temperature=0.7)),
    "ranknet": (RankNet, RankNetSection(temperature=0.4)),
    "lambdarank": (LambdaRank, LambdaRankSection(temperature=0.4)),
    "lambdarank, first two": (LambdaRank, LambdaRankSection(temperature=0.4, top=2)),
    "ndcg2, linear": (LambdaRank, LambdaRankSection(bound="ndcg2", gain="linear")),
    "ndcg2++": (LambdaRank, LambdaRankSection(bound="ndcg2++", mu=3, temperature=0.5, top=1)),
}


def graded(shares, seed=0, ungraded=0.2, grades=3):
    """The same with whole grades, some of them missing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(d: int) -> torch.Tensor:
        scores = torch.randint(grades, (d,), generator=generator).double()
        return scores.masked_fill(torch.rand(d, generator=generator) < ungraded, torch.nan)

    return [replace(s, scores=draw(len(s.documents))) for s in shares]


def order_of_all(whole: Whole, section, learned):
    pairs, missing = [], 0
    similar = angle if section.kind == "angle" else partial(similarity, "inner_product")
    for r, i in whole:
        for j in whole.own(r, i):
            grade, weight = float(whole.shares[r].scores[j]), whole.weight(r, i)
            missing += math.isnan(grade)
            if not math.isnan(grade) and weight > 0:
                pairs.append((similar(*whole.pair(r, i, j)) / value_at(section.temperature, PROGRESS), grade, weight))
    total = 1 + sum((x * 0).sum() for x in (*whole.queries, *whole.documents))
    count = 0
    for (high, y, w), (low, z, v) in itertools.permutations(pairs, 2):
        if y > z:
            total = total + w * v * (low - high).exp()
            count += 1
    return total.log(), {"ordered_pairs": float(count), "ungraded": float(missing)}


def angle(q, k):
    """|sum of the real and imaginary parts| of q times the conjugate of k, in complex arithmetic."""
    half = (len(q) + 1) // 2
    padded = [torch.cat([x, x.new_zeros(2 * half - len(x))]) for x in (q, k)]
    z, w = (torch.complex(x[:half], x[half:]) for x in padded)
    product = (z * w.conj()).sum()
    return (product.real + product.imag).abs()


def lists(whole: Whole, section, learned):
    losses, weights, right, pairs, alone = [], [], 0, 0, 0
    for r, i in whole:
        grades = {j: float(whole.shares[r].scores[j]) for j in whole.own(r, i)}
        grades = {j: y for j, y in grades.items() if not math.isnan(y)}
        kinds = len(grades) if section.kind == "listnet" else len(set(grades.values()))
        if kinds < 2:
            alone += 1
            continue
        temperature = value_at(section.temperature, PROGRESS)
        logits = {j: similarity("inner_product", *whole.pair(r, i, j)) / temperature for j in grades}
        losses.append(ONE_LIST[section.kind](section, logits, grades))
        weights.append(whole.weight(r, i))
        for a, b in itertools.permutations(grades, 2):
            pairs += grades[a] > grades[b]
            right += grades[a] > grades[b] and bool(logits[a] > logits[b])
    metrics = {"pair_accuracy": right / max(1, pairs), "nothing_to_compare": float(alone)}
    return weighted_mean(whole, losses, weights), metrics


def listmle(section, logits, grades):
    total = 0
    for i, y in grades.items():
        if any(z < y for z in grades.values()):
            total = total + torch.stack([logits[j] for j, z in grades.items() if z <= y]).logsumexp(0) - logits[i]
    return total


def listnet(section, logits, grades):
    target = (torch.tensor(list(grades.values()), dtype=torch.float64) / section.grade_temperature).softmax(0)
    return -(target * torch.stack(list(logits.values())).log_softmax(0)).sum()


def ranknet(section, logits, grades):
    pairs = [(i, j) for i, j in itertools.permutations(grades, 2) if grades[i] > grades[j]]
    return sum(softplus(logits[j] - logits[i]) for i, j in pairs) / len(pairs)


def lambdarank(section, logits, grades):
    top = section.top or len(grades)
    rank = {j: r for r, j in enumerate(sorted(grades, key=lambda j: -float(logits[j])), 1)}
    gain = {j: 2**y - 1 if section.gain == "exponential" else y for j, y in grades.items()}
    best = sum(g / math.log2(1 + r) for r, g in enumerate(sorted(gain.values(), reverse=True)[:top], 1))
    total = 0
    for i, j in itertools.permutations(grades, 2):
        if grades[i] > grades[j] and min(rank[i], rank[j]) <= top:
            rho = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
            apart = abs(rank[i] - rank[j])
            delta = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
            weight = {"lambdarank": rho, "ndcg2": delta, "ndcg2++": rho + section.mu * delta}[section.bound]
            total = total + weight * abs(gain[i] - gain[j]) / best * softplus(logits[j] - logits[i])
    return total


ONE_LIST = {"listmle": listmle, "listnet": listnet, "ranknet": ranknet, "lambdarank": lambdarank}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("objective", "section"), [(Cosent, CosentSection(temperature=0.3)), (Angle, AngleSection())])
def test_all_graded_pairs_are_ordered_as_by_definition(gloo, objective, section, split):
    check(gloo, objective, section, order_of_all, graded(random_shares(1, SPLITS[split], DIM)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", LISTWISE)
def test_listwise_losses_equal_their_definitions(gloo, name, split):
    objective, section = LISTWISE[name]
    check(gloo, objective, section, lists, graded(random_shares(2, SPLITS[split], DIM)))


def test_pairs_without_weights_weigh_the_same(gloo):
    shares = [replace(s, weights=None) for s in graded(random_shares(3, SPLITS["two"], DIM))]
    check(gloo, Cosent, CosentSection(), order_of_all, shares)
    check(gloo, RankNet, RankNetSection(), lists, shares)


def test_token_vectors_are_compared_by_their_maxima():
    shares = graded(random_shares(4, SPLITS["one"], DIM, tokens=3))
    check(None, Cosent, CosentSection(temperature=1.0), order_of_all, shares)
    check(None, ListMLE, ListMLESection(temperature=1.0), lists, shares)
    with pytest.raises(ValueError, match="token vectors"):
        Angle(AngleSection(), Group())(shares[0])


def test_an_odd_dimension_has_a_last_imaginary_part_of_zero():
    check(None, Angle, AngleSection(), order_of_all, graded(random_shares(5, [(3, 5)], 5)))


def test_a_pair_of_weight_two_counts_as_two_pairs():
    (share,) = graded(random_shares(6, [(3, 3)], DIM), ungraded=0)
    share = replace(share, weights=None, scores=torch.tensor([0.0, 1.0, 2.0]))
    twice = torch.tensor([0, 1, 1, 2])
    doubled = replace(
        share,
        queries=share.queries[twice],
        documents=share.documents[twice],
        query_keys=share.query_keys[twice],
        document_keys=share.document_keys[twice],
        owners=torch.arange(4),
        scores=share.scores[twice],
    )
    weighted = replace(share, weights=torch.tensor([1.0, 2.0, 1.0]))
    found, expected = (Cosent(CosentSection(), Group())(s).metrics["loss"] for s in (weighted, doubled))
    assert found == pytest.approx(expected)


def test_pairs_of_weight_zero_are_not_there():
    (share,) = graded(random_shares(6, [(3, 6)], DIM), ungraded=0)
    share = replace(share, weights=torch.tensor([0.0, 1.0, 0.0]), scores=torch.tensor([2.0, 1, 0, 2, 0, 0]))
    check(None, Cosent, CosentSection(), order_of_all, [share])
    check(None, ListMLE, ListMLESection(), lists, [share])


def test_bfloat16_embeddings_cost_a_rounding():
    (share,) = graded(random_shares(9, [(4, 12)], DIM))
    for objective, section in [(Cosent, CosentSection(temperature=0.2)), (LambdaRank, LambdaRankSection())]:
        rounded = [in_type(share, torch.bfloat16), in_type(in_type(share, torch.bfloat16), torch.float64)]
        rounded = [replace(s, scores=share.scores, weights=share.weights) for s in rounded]
        gradients = []
        for s in rounded:
            s.queries.requires_grad_()
            result = objective(section, Group())(s)
            result.loss.backward()
            gradients.append(s.queries.grad)
            assert result.metrics["loss"] == pytest.approx(
                objective(section, Group())(rounded[1]).metrics["loss"], 1e-5
            )
        assert gradients[0].dtype == torch.bfloat16
        assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[1].norm()


def test_one_document_of_grade_one_makes_listmle_the_softmax_cross_entropy():
    (share,) = random_shares(7, [(1, 5)], DIM)
    share = replace(share, scores=torch.tensor([1.0, 0, 0, 0, 0]))
    logits = share.documents @ share.queries[0] / 0.05
    loss = ListMLE(ListMLESection(), Group())(share).metrics["loss"]
    assert loss == pytest.approx(float(logits.logsumexp(0) - logits[0]))


@pytest.mark.parametrize("objective", [Cosent, Angle, ListMLE, ListNet, RankNet, LambdaRank])
def test_without_two_grades_the_loss_and_its_gradient_are_zero(objective):
    sections = {Cosent: CosentSection(), Angle: AngleSection(), ListMLE: ListMLESection(), ListNet: ListNetSection()}
    section = sections.get(objective) or (RankNetSection() if objective is RankNet else LambdaRankSection())
    (share,) = random_shares(8, [(2, 4)], DIM)
    scores = torch.full((4,), torch.nan)
    scores[0] = 1.0
    definition = order_of_all if objective in (Cosent, Angle) else lists
    (metrics,) = check(None, objective, section, definition, [replace(share, scores=scores)])
    assert metrics["loss"] == 0.0


@settings(max_examples=40)
@given(
    counts=st.tuples(st.integers(0, 4), st.integers(0, 7)),
    grades=st.integers(1, 4),
    ungraded=st.sampled_from([0.0, 0.3, 1.0]),
    name=st.sampled_from([*LISTWISE, "cosent"]),
    seed=st.integers(0, 10**6),
)
def test_any_lists_and_grades_equal_the_definition(counts, grades, ungraded, name, seed):
    b, more = counts
    shares = graded(random_shares(seed, [(b, b + more * (b > 0))], 4), seed, ungraded, grades)
    objective, section = LISTWISE.get(name, (Cosent, CosentSection(temperature=0.5)))
    check(None, objective, section, order_of_all if name == "cosent" else lists, shares)


def test_scores_that_are_missing_are_named_with_the_keys_of_the_data():
    (share,) = random_shares(0, [(2, 3)], DIM)
    share = replace(share, scores=None)
    for objective, section in [(Cosent, CosentSection()), (ListNet, ListNetSection())]:
        with pytest.raises(UsageError, match=r"needs a score of each.*positive_scores and .*negative_scores"):
            objective(section, Group())(share)
    with pytest.raises(UsageError, match="graded_weights needs a score"):
        graded_weights(GradedWeights(), share)


def test_gains_of_negative_grades_are_refused():
    (share,) = random_shares(0, [(2, 4)], DIM)
    share = replace(share, scores=torch.tensor([1.0, -2.0, 0.0, -1.0]), owners=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="scores has -2: lambdarank"):
        LambdaRank(LambdaRankSection(), Group())(share)
    with pytest.raises(ValueError, match="scores has -2: graded_weights"):
        graded_weights(GradedWeights(), share)


@pytest.mark.parametrize(
    ("gain", "expected"), [("linear", [0.0, 3.0, 0.0]), ("logarithmic", [0, 2, 0]), ("exponential", [0, 7, 0])]
)
def test_pairs_weigh_as_much_as_their_positives_grade(gain, expected):
    (share,) = random_shares(0, [(3, 4)], DIM)
    share = replace(share, scores=torch.tensor([0.0, 3.0, torch.nan, 5.0]), weights=None)
    assert graded_weights(GradedWeights(gain=gain), share).weights.tolist() == pytest.approx(expected)
    twice = replace(share, weights=torch.full((3,), 2.0))
    assert graded_weights(GradedWeights(gain=gain), twice).weights.tolist() == pytest.approx([2 * x for x in expected])


def test_a_temperature_above_zero_is_asked_for():
    with pytest.raises(ValidationError, match="temperature of 0"):
        ListMLESection(temperature={"start": 1, "end": 0})
