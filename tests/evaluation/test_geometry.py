"""Figures of a cloud of vectors: on clouds whose figures are known, and against plain loops."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import skew

from evaluation import geometry
from evaluation.bias import association, associations, probes
from evaluation.slices import by_language, by_length
from evaluation.vectors import Vectors, unit_length
from tests.evaluation.worlds import Table, random_table


def cloud(rows=60, dim=16, seed=0):
    return unit_length(np.random.default_rng(seed).normal(size=(rows, dim))).astype(np.float32)


def test_alignment_uniformity_and_anisotropy_are_their_means_over_pairs():
    a, b = cloud(seed=1), cloud(seed=2)
    pairs = list(itertools.combinations(a.astype(float), 2))
    assert geometry.alignment(a, b) == pytest.approx(np.mean([((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)]))
    assert geometry.uniformity(a) == pytest.approx(
        math.log(np.mean([math.exp(-2 * ((x - y) ** 2).sum()) for x, y in pairs])), abs=1e-6
    )
    assert geometry.anisotropy(a) == pytest.approx(np.mean([x @ y for x, y in pairs]), abs=1e-9)


def test_one_direction_is_the_worst_of_all():
    same = np.tile(cloud(1), (20, 1))
    assert geometry.uniformity(same) == pytest.approx(0, abs=1e-5)
    assert geometry.anisotropy(same) == pytest.approx(1)
    assert geometry.alignment(same, same) == 0
    assert geometry.effective_rank(same) == 1


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_of_equal_directions_is_their_number(rank):
    axes = np.eye(16)[:rank]
    assert geometry.effective_rank(np.concatenate([axes, -axes])) == pytest.approx(rank)


def test_a_hub_is_seen_as_skewness():
    queries = np.eye(12, dtype=np.float32)
    even = geometry.hubness(queries, queries, k=1)
    hub = np.concatenate([np.ones((1, 12)) / math.sqrt(12), -np.eye(12)]).astype(np.float32)
    assert even == 0
    assert geometry.hubness(queries, hub, k=1) == pytest.approx(skew([12] + [0] * 12))


def test_the_gap_is_the_distance_of_the_sides_means():
    a = cloud()
    assert geometry.modality_gap(a, a) == 0
    assert geometry.modality_gap(np.tile([[1.0, 0]], (5, 1)), np.tile([[0, 1.0]], (7, 1))) == pytest.approx(
        math.sqrt(2)
    )


def test_a_block_of_dimensions_tells_pairs_apart_or_nothing():
    a = cloud(dim=16)
    b = a.copy()
    b[:, 8:] = cloud(seed=5)[:, 8:]  # the second half of the documents is another's
    shares = geometry.probe_dimensions(a, b, blocks=2)
    assert shares[0] == 1
    assert shares[1] < 0.2
    twice = np.concatenate([a, a])
    assert geometry.probe_dimensions(twice, twice, blocks=4).tolist() == [1] * 4  # equal documents are one


def test_stability_is_the_share_of_neighbours_that_stayed():
    assert geometry.stability([["a", "b"], ["c"]], [["b", "a"], ["c"]]) == 1
    assert geometry.stability([["a", "b"]], [["b", "c"]]) == pytest.approx(1 / 3)
    assert geometry.stability([[]], [[]]) == 1


def test_many_vectors_are_drawn_and_the_same_every_time(monkeypatch):
    assert geometry.drawn(300) == list(range(300))
    monkeypatch.setattr(geometry, "MOST_VECTORS", 200)
    some = geometry.drawn(300)
    assert some == geometry.drawn(300) == sorted(set(some))
    assert len(some) == 200
    vectors = cloud(300)
    assert geometry.uniformity(vectors[some]) == pytest.approx(geometry.uniformity(vectors), abs=0.1)


def test_an_association_is_found_where_it_was_planted_and_has_its_sign():
    x, y, a, b = (np.tile(row, (8, 1)) + 0.01 * cloud(8, 4, seed=i) for i, row in enumerate(np.eye(4)))
    a, b = x + 0.2 * a, y + 0.2 * b
    found = association(x, y, a, b)
    assert found["effect"] > 1.5
    assert found["p"] < 0.01
    assert association(y, x, a, b)["effect"] == pytest.approx(-found["effect"])
    assert association(y, x, a, b)["p"] > 0.9
    assert abs(association(x, x, a, b)["effect"]) < 1e-9


def test_the_shipped_probes_are_whole_and_of_disjoint_words():
    assert len(probes()) >= 5
    for probe in probes().values():
        assert min(map(len, probe)) >= 6
        assert not set(probe.x) & set(probe.y)
        assert not set(probe.a) & set(probe.b)
    sentences = {s.format(w) for p in probes().values() for side in p for w in side for s in ("This is {}.",)}
    table = random_table([text.replace("This is", start) for text in sentences for start in _STARTS], seed=3)
    found = associations(Vectors(table))
    assert set(found) == set(probes())
    assert all(abs(told["effect"]) < 1.3 for told in found.values())  # random vectors associate nothing much


_STARTS = ("This is", "That is", "Here we speak of")


def test_slices_are_means_of_their_queries_and_few_queries_make_none():
    scores = {"mrr@10": np.array([1, 0, 1, 0, 1, 1, 0.5])}
    texts = ["two words"] * 6 + ["word " * 40]
    assert by_length(scores, texts) == {"1 to 8 words (6)": {"mrr@10": pytest.approx(4 / 6)}}
    spoken = by_language(scores, ["de"] * 5 + ["en"] * 2)
    assert spoken == {"language de (5)": {"mrr@10": pytest.approx(0.6)}}


def test_a_model_without_unit_vectors_is_scaled_for_its_geometry():
    from tests.evaluation.test_tasks import retrieval, texts

    queries, documents = texts("q", 6), texts("d", 6)
    rng = np.random.default_rng(0)
    table = Table({text: 5 * rng.normal(size=4) for text in [*queries, *documents]}, unit=False)
    found = retrieval(queries, documents, [{i: 1} for i in range(6)]).geometry(Vectors(table))
    assert 0 <= found["alignment"] <= 4
    assert -1 <= found["anisotropy"] <= 1
