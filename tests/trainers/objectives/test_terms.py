"""Terms over all texts of the batch equal their definitions, pair by pair, at any split over workers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from tests.trainers.objectives.naive import Whole, check, weighted_mean
from tests.twins import in_type, random_shares
from trainers.collectives import Group
from trainers.objectives.sections.terms import AlignmentSection, KoLeoSection, SpreadOutSection, UniformitySection
from trainers.objectives.terms import Alignment, KoLeo, SpreadOut, Uniformity

DIM = 6
# (b, d) of each worker: uneven, one without queries, one with nothing
SPLITS = {
    "one": [(5, 8)],
    "two": [(4, 7), (2, 2)],
    "three": [(3, 5), (0, 2), (2, 2)],
    "three, one idle": [(2, 4), (0, 0), (3, 3)],
}


def alignment(whole: Whole, section: AlignmentSection, learned):
    distances = [(q - k).norm() ** section.power for q, k in (whole.pair(r, i, i) for r, i in whole)]
    return weighted_mean(whole, distances, [whole.weight(r, i) for r, i in whole]), {}


def uniformity(texts, section: UniformitySection):
    apart = [(-section.sharpness * (x - y).square().sum()).exp() for x, y in _others(texts)]
    return torch.stack(apart).mean().log()


def spread_out(texts, section: SpreadOutSection):
    similar = torch.stack([x @ y for x, y in _others(texts)])
    second = similar.square().mean() - 1 / DIM
    return section.first_moment * similar.mean() ** 2 + section.second_moment * second.clamp(min=0)


def koleo(texts, section: KoLeoSection):
    nearest = [min((x - y).norm() for y in texts if y is not x) for x in texts]
    return -torch.stack(nearest).log().mean()


def _others(texts):
    return [(x, y) for x in texts for y in texts if x is not y]


def of_sides(definition, whole: Whole, section, learned):
    """The definition's loss over the texts of the chosen side, or the mean of both."""
    pairs = [whole.pair(r, i, i) for r, i in whole]
    sides = {"queries": [0], "documents": [1], "both": [0, 1]}[section.of]
    losses = [definition([pair[side] for pair in pairs], section) for side in sides]
    return sum(losses) / len(losses), {}


TERMS = {
    "uniformity": (Uniformity, partial(UniformitySection, sharpness=1.5), uniformity),
    "spread out": (SpreadOut, partial(SpreadOutSection, first_moment=2.0, second_moment=0.5), spread_out),
    "spread out, first": (SpreadOut, partial(SpreadOutSection, second_moment=0), spread_out),
    "spread out, second": (SpreadOut, partial(SpreadOutSection, first_moment=0), spread_out),
    "koleo": (KoLeo, KoLeoSection, koleo),
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("split", SPLITS)
def test_alignment_is_the_weighted_mean_of_distances(gloo, split, power, weighted):
    shares = random_shares(3, SPLITS[split], DIM)
    shares = shares if weighted else [replace(share, weights=None) for share in shares]
    check(gloo, Alignment, AlignmentSection(power=power), alignment, shares)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("term", TERMS)
def test_every_text_meets_every_other_once(gloo, term, split):
    make, section, definition = TERMS[term]
    for of, tile in (("queries", 2), ("documents", 3), ("both", 4096)):
        shares = random_shares(4, SPLITS[split], DIM)
        # tolerance: KoLeo adds 1e-8 to a squared distance
        check(gloo, make, section(of=of, tile=tile), partial(of_sides, definition), shares, tolerance=1e-7)


@pytest.mark.parametrize("term", TERMS)
def test_a_batch_of_one_query_has_no_others(gloo, term):
    make, section, _ = TERMS[term]
    nothing = lambda whole, section, learned: (weighted_mean(whole, [], []), {})  # noqa: E731
    check(gloo, make, section(), nothing, random_shares(5, [(0, 0), (1, 3)], DIM))


@pytest.mark.parametrize("term", TERMS)
def test_equal_texts_give_finite_gradients(term):
    make, section, _ = TERMS[term]
    share = in_type(random_shares(6, [(4, 4)], DIM)[0], torch.float32)
    same = share.queries[:1].repeat(4, 1).requires_grad_()
    make(section(), Group())(replace(share, queries=same)).loss.backward()
    assert same.grad.isfinite().all()


def test_a_query_on_its_positive_has_a_finite_gradient():
    share = random_shares(6, [(3, 3)], DIM)[0]
    queries = share.documents.clone().requires_grad_()
    Alignment(AlignmentSection(power=1), Group())(replace(share, queries=queries)).loss.backward()
    assert not queries.grad.any()


@pytest.mark.parametrize("make", [Alignment, *(make for make, *_ in TERMS.values())])
def test_token_vectors_are_refused(make):
    share = random_shares(7, [(2, 2)], DIM, tokens=3)[0]
    section = AlignmentSection() if make is Alignment else SpreadOutSection()
    with pytest.raises(ValueError, match=rf"{make.__name__} needs one vector a text \[b, D\]"):
        make(section, Group())(share)


def test_a_term_that_would_do_nothing_is_refused():
    with pytest.raises(ValidationError, match="first_moment and second_moment are both 0"):
        SpreadOutSection(first_moment=0, second_moment=0)
