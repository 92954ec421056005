"""Losses over pairs and triplets equal their definitions, one pair at a time, at any split over workers."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import softplus

from tests.trainers.objectives.naive import PROGRESS, Whole, check, similarity, weighted_mean
from tests.twins import random_rows, random_shares
from trainers.collectives import Group
from trainers.objectives.pairwise import EnergyHinge, Sigmoid, Triplet
from trainers.objectives.sections.numbers import Learned, value_at
from trainers.objectives.sections.pairwise import EnergyHingeSection, SigmoidSection, TripletSection

DIM = 6
# (b, d) of each worker: uneven, one without queries, one with nothing
SPLITS = {
    "one": [(5, 8)],
    "two": [(4, 7), (2, 2)],
    "three, one without queries": [(3, 5), (0, 2), (2, 2)],
    "three, one idle": [(2, 4), (0, 0), (3, 3)],
}
SIGMOIDS = {
    "learned": {"temperature": {"start": 0.5}, "bias": {"start": -1.0}},
    "fixed": {"temperature": 0.5, "bias": -1.0},
    "bias learned": {"temperature": 0.5, "bias": {"start": -2.0}},
    "scheduled": {"temperature": {"start": 1, "end": 0.2}, "bias": {"start": 0, "end": -4}},
    "no masks": {"temperature": {"start": 0.5}, "mask_same_document": False, "mask_same_query": False},
    "no queue": {"temperature": {"start": 0.5}, "bias": {"start": -1.0}, "queue": False},
}
TRIPLETS = {
    "hardest": {"mining": "batch_hard"},
    "hardest, cosine": {"mining": "batch_hard", "similarity": "inner_product"},
    "hardest, soft": {"mining": "batch_hard", "similarity": "squared_distance", "margin": None},
    "semi-hard": {"mining": "semi_hard", "similarity": "squared_distance", "margin": 0.8},
    "semi-hard, other labels": {"mining": "semi_hard", "margin": 0.5, "mask_same_label": True},
    "all": {"mining": "batch_all"},
    "all, squared": {"mining": "batch_all", "similarity": "squared_distance", "margin": 0.5},
    "all, cosine, no queue": {"mining": "batch_all", "similarity": "inner_product", "queue": False},
}
OWN = {
    "distance": {"mining": "own"},
    "soft": {"mining": "own", "similarity": "inner_product", "margin": None},
}


def sigmoid(whole: Whole, section: SigmoidSection, learned):
    temperature = learned["log_temperature"].exp() if isinstance(section.temperature, Learned) else None
    temperature = value_at(section.temperature, PROGRESS) if temperature is None else temperature
    bias = learned["bias"] if isinstance(section.bias, Learned) else value_at(section.bias, PROGRESS)
    losses, weights, right, alone = [], [], [], 0
    for r, i in whole:
        q, k = whole.pair(r, i, i)
        positive = similarity("inner_product", q, k) / temperature
        negatives = [similarity("inner_product", q, n) / temperature for n in whole.negatives(r, i, section)]
        losses.append(softplus(-(positive + bias)) + sum(softplus(n + bias) for n in negatives))
        weights.append(whole.weight(r, i))
        alone += not negatives
        right += [float(positive) > max(map(float, negatives))] if negatives else []
    metrics = {
        "accuracy": sum(right) / max(1, len(right)),
        "nothing_to_compare": float(alone),
        "temperature": float(temperature),
        "bias": float(bias),
    }
    return weighted_mean(whole, losses, weights), metrics


def triplets(whole: Whole, section: TripletSection | EnergyHingeSection, learned):
    kind = getattr(section, "similarity", "inner_product")
    mining = getattr(section, "mining", "batch_hard")
    losses, weights, alone = [], [], 0
    for r, i in whole:
        q, k = whole.pair(r, i, i)
        positive = similarity(kind, q, k)
        if mining == "own":
            others = [whole.pair(r, i, j)[1] for j in whole.own(r, i) if j != i]
        else:
            others = whole.negatives(r, i, section)
        found = [similarity(kind, q, n) for n in others]
        if mining == "semi_hard":
            found = [s for s in found if s <= positive]
        if mining in ("semi_hard", "batch_hard") and found:
            found = [max(found)]
        if mining == "batch_all":
            found = [s for s in found if s - positive + section.margin > 0]
        alone += not found
        for s in found:
            excess = s - positive
            losses.append(softplus(excess) if section.margin is None else (excess + section.margin).relu())
            weights.append(whole.weight(r, i))
    metrics = {"triplets": float(len(losses)), "nothing_to_compare": float(alone)}
    if mining == "batch_all":
        del metrics["nothing_to_compare"]
    return weighted_mean(whole, losses, weights), metrics


def _queue(tokens: int = 0):
    return {"documents": random_rows(8, 11, DIM, distinct=12, tokens=tokens)}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SIGMOIDS)
def test_sigmoid_equals_its_definition(gloo, name, split):
    section = SigmoidSection.model_validate({"tile": 3} | SIGMOIDS[name])
    check(gloo, Sigmoid, section, sigmoid, random_shares(1, SPLITS[split], DIM, distinct=12), _queue())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TRIPLETS)
def test_triplets_of_the_batch_equal_their_definition(gloo, name, split):
    section = TripletSection.model_validate({"tile": 3} | TRIPLETS[name])
    check(gloo, Triplet, section, triplets, random_shares(2, SPLITS[split], DIM, distinct=12), _queue())


@pytest.mark.parametrize("split", ["one", "two", "three, one idle"])
@pytest.mark.parametrize("name", OWN)
def test_triplets_of_own_negatives_equal_their_definition(gloo, name, split):
    section = TripletSection.model_validate(OWN[name])
    check(gloo, Triplet, section, triplets, random_shares(3, SPLITS[split], DIM))


@pytest.mark.parametrize("split", SPLITS)
def test_energy_hinge_equals_its_definition(gloo, split):
    shares = random_shares(4, SPLITS[split], DIM, distinct=12)
    check(gloo, EnergyHinge, EnergyHingeSection(margin=0.3, tile=4), triplets, shares, _queue())


@pytest.mark.parametrize("split", ["one", "three, one without queries"])
def test_token_vectors_are_compared_by_their_maxima(gloo, split):
    shares, queues = random_shares(5, SPLITS[split], DIM, distinct=12, tokens=3), _queue(tokens=3)
    section = SigmoidSection(temperature=Learned(start=1.0), bias=Learned(start=-2.0), tile=3)
    check(gloo, Sigmoid, section, sigmoid, shares, queues)
    check(gloo, EnergyHinge, EnergyHingeSection(), triplets, shares, queues)
    check(gloo, Triplet, TripletSection(mining="batch_all", similarity="inner_product"), triplets, shares, queues)


def test_the_bias_starts_low_and_both_scalars_are_learned():
    assert Sigmoid(SigmoidSection(), Group()).learned == {"log_temperature": math.log(0.1), "bias": -10.0}
    assert Sigmoid(SigmoidSection(temperature=0.1, bias=-10.0), Group()).learned == {}


def test_a_mask_of_labels_needs_them():
    assert TripletSection(mask_same_label=True).needs == {"labels"}
    assert TripletSection().needs == frozenset()


def test_a_batch_with_nothing_to_compare_has_a_loss_of_zero():
    ((share),) = random_shares(6, [(1, 1)], DIM)
    for mining in ("own", "batch_hard", "semi_hard", "batch_all"):
        (metrics,) = check(None, Triplet, TripletSection(mining=mining), triplets, [share])
        assert (metrics["loss"], metrics["triplets"]) == (0.0, 0.0)
    (metrics,) = check(None, Sigmoid, SigmoidSection(), sigmoid, [share])
    assert metrics["nothing_to_compare"] == 1.0
    assert metrics["loss"] > 0  # its positive's part


def test_equal_vectors_have_a_distance_without_gradient():
    (share,) = random_shares(7, [(2, 2)], DIM)
    share.documents[1] = share.queries[0]
    share.queries.requires_grad_()
    result = Triplet(TripletSection(mask_same_query=False), Group())(share)
    result.loss.backward()
    assert torch.isfinite(share.queries.grad).all()


def test_the_distance_of_token_vectors_is_refused():
    (share,) = random_shares(0, [(2, 2)], DIM, tokens=3)
    with pytest.raises(ValueError, match="token vectors"):
        Triplet(TripletSection(similarity="distance"), Group())(share)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (SigmoidSection, {"temperature": {"start": 0}}, "temperature of 0"),
        (SigmoidSection, {"temperature": -1}, "temperature of -1"),
        (TripletSection, {"mining": "batch_all", "margin": None}, "soft margin"),
    ],
)
def test_settings_that_make_no_sense_are_refused(section, settings, message):
    with pytest.raises(ValidationError, match=message):
        section.model_validate(settings)
