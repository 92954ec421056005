"""The loss, its gradients and metrics equal the dense float64 twin at any split over workers, whatever is asked."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_services.schema import UNKNOWN, UsageError
from tests.twins import Dense, dense_contrastive, in_type, of_worker, random_rows, random_shares
from trainers.collectives import Group
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.sections.contrastive import ContrastiveSection

DIM = 16
# (b, d) of each worker: even and uneven, one without hard negatives, one without queries, one with nothing
SPLITS = {
    "one": [(7, 11)],
    "two": [(4, 9), (3, 3)],
    "three": [(5, 8), (0, 2), (2, 2)],
    "three, one idle": [(3, 3), (4, 6), (0, 0)],
    "four": [(2, 3), (1, 1), (0, 0), (4, 7)],
}
# Every axis alone, and some that meet.
AXES = {
    "both directions": {},
    "one direction": {"directions": "query_to_document"},
    "no masks": {"mask_same_document": False, "mask_same_query": False},
    "squared distance": {"similarity": "squared_distance", "temperature": 0.8},
    "joint": {"normalisation": "joint"},
    "queries among themselves": {"normalisation": "joint", "among_queries": True},
    "Qwen3": {"normalisation": "joint", "directions": "query_to_document", "among_queries": True,
              "false_negatives": {"margin": -0.1}},
    "GTE": {"normalisation": "joint", "among_queries": True, "among_documents": True},
    "decoupled": {"decoupled": True},
    "decoupled, weighted": {"decoupled": True, "von_mises_fisher": 0.5},
    "margins": {"additive_margin": 0.1, "angular_margin": 0.2},
    "label smoothing": {"label_smoothing": 0.1},
    "supervised, outside": {"positives": {"same_label": True}},
    "supervised, inside": {"positives": {"same_label": True, "sum": "inside"}},
    "several positives": {"positives": {"same_query": True, "same_document": True}},
    "several positives and a margin": {"positives": {"same_query": True}, "false_negatives": {"margin": 0.2}},
    "targets by labels": {"soft_targets": {"alike": [{"labels": [0, 1], "similarity": 0.5},
                                                     {"labels": [0, 1, 2], "similarity": 0.2}]}},
    "targets by scores": {"soft_targets": {"scores": True}, "mask_same_query": False},
    "targets by both, and a margin": {"soft_targets": {"scores": True, "alike": [{"labels": [0, 2], "similarity": 1}]},
                                      "mask_same_query": False, "false_negatives": {"margin": -0.1}},
    "relative margin": {"false_negatives": {"share": 0.9}},
    "reference": {"false_negatives": {"reference": 0.2}},
    "debiased": {"debiased": {"concentration": 0}, "temperature": 0.5},
    "hard and debiased": {"debiased": {"concentration": 0.5, "positive_share": 0.05}, "temperature": 0.5},
    "harder": {"harder": 0.3},
    "same label": {"mask_same_label": True},
    "one task": {"only_same": ["tasks"]},
    "known negatives": {"ignore_unrelated": True},
    "own hard negatives and the queue": {"batch_negatives": "own"},
    "the queue alone": {"batch_negatives": "none"},
    "momentum positives": {"positive_encoding": "momentum"},
    "hardest share": {"hardest_share": 0.3},
    "learned": {"temperature": {"start": 0.2}},
    "scheduled": {"temperature": {"start": 0.2, "end": 0.1}},
}  # fmt: skip
QUEUES = {"none": {}, "documents": {"documents": 23}, "both": {"documents": 17, "queries": 9}}


def section_of(axis: str, **more) -> ContrastiveSection:
    return ContrastiveSection.model_validate({"temperature": 0.1, "tile": 3} | AXES[axis] | more)


def _run(shares, section, queues, dtype):
    """On a rank: (loss share, metrics, dL/dqueries, dL/ddocuments, this worker's part of dL/dlearned)."""
    group = Group()
    share = of_worker(shares[group.rank], queues, group.rank, group.size, dtype)
    objective = Contrastive(section, group)
    learned = {k: torch.tensor(v, dtype=dtype, requires_grad=True) for k, v in objective.learned.items()}
    result = objective(replace(share, learned=learned, progress=0.25))
    result.loss.backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (share.queries, share.documents)]
    return float(result.loss.detach()), result.metrics, *grads, {k: v.grad for k, v in learned.items()}


def everywhere(gloo, shares, section, queues=None, dtype=torch.float64):
    arguments = shares, section, queues or {}, dtype
    return [_run(*arguments)] if len(shares) == 1 else gloo(len(shares), _run, *arguments)


def twin(shares, section, queues=None) -> Dense:
    learned = Contrastive(section, Group()).learned
    return dense_contrastive(shares, section, queues, learned, progress=0.25)


def assert_equal(ranks, dense: Dense, tolerance=1e-9):
    assert sum(rank[0] for rank in ranks) == pytest.approx(dense.loss, rel=tolerance, abs=tolerance)
    for r, (_, metrics, queries, documents, _) in enumerate(ranks):
        metrics = {k: v for k, v in metrics.items() if k != "temperature"}
        assert metrics == pytest.approx(dense.metrics, rel=10 * tolerance, abs=1e-6)
        for found, expected in ((queries, dense.query_gradients[r]), (documents, dense.document_gradients[r])):
            torch.testing.assert_close(found.double(), expected, rtol=100 * tolerance, atol=tolerance)
    for name, expected in dense.learned_gradients.items():
        found = sum(rank[4][name].double() for rank in ranks)
        torch.testing.assert_close(found, expected, rtol=100 * tolerance, atol=tolerance)


def queues_of(kind: str, distinct: int, tokens: int = 0):
    return {n: random_rows(5 + i, k, DIM, distinct, tokens) for i, (n, k) in enumerate(QUEUES[kind].items())}


# Each axis meets each split or each queue at least once; `make proof` has all of them.
PAIRS = [(a, s, q) for i, a in enumerate(AXES) for s, q in [(list(SPLITS)[i % 5], list(QUEUES)[1 + i % 2])]]
PAIRS += [("both directions", s, q) for s in SPLITS for q in QUEUES]


@pytest.mark.parametrize(("axis", "split", "queue"), PAIRS)
def test_loss_gradients_and_metrics_equal_the_dense_twin(gloo, axis, split, queue):
    section, queues = section_of(axis), queues_of(queue, distinct=12)
    shares = random_shares(4, SPLITS[split], DIM, distinct=12)
    assert_equal(everywhere(gloo, shares, section, queues), twin(shares, section, queues))


@pytest.mark.proof
@pytest.mark.parametrize(("axis", "split", "queue"), itertools.product(AXES, SPLITS, QUEUES))
def test_loss_gradients_and_metrics_equal_the_dense_twin_everywhere(gloo, axis, split, queue):
    section, queues = section_of(axis), queues_of(queue, distinct=12)
    shares = random_shares(4, SPLITS[split], DIM, distinct=12)
    assert_equal(everywhere(gloo, shares, section, queues), twin(shares, section, queues))


@pytest.mark.parametrize("directions", ["both", "query_to_document"])
@pytest.mark.parametrize(("tokens", "of_documents", "queue"), [(3, 5, "documents"), (3, 5, "none"), (5, 2, "none")])
@pytest.mark.parametrize("split", ["one", "three"])
def test_late_interaction_equals_its_twin(gloo, split, tokens, of_documents, queue, directions):
    """Queries that are the longer side stay, and the documents travel, where there is no queue."""
    section = section_of("both directions", similarity="max_sim", directions=directions, temperature=1.0)
    queues = queues_of(queue, distinct=12, tokens=4)
    shares = random_shares(4, SPLITS[split], DIM, distinct=12, tokens=tokens, of_documents=of_documents)
    assert_equal(everywhere(gloo, shares, section, queues), twin(shares, section, queues))


def test_the_loss_does_not_know_how_the_batch_was_split(gloo):
    section, queues = section_of("both directions"), {"documents": random_rows(1, 32, DIM)}
    whole = random_shares(8, [(6, 6)], DIM)[0]
    losses = []
    for cuts in ([6], [3, 3], [1, 5], [2, 0, 4]):
        starts = [sum(cuts[:i]) for i in range(len(cuts))]
        shares = [piece(whole, slice(at, at + n)) for at, n in zip(starts, cuts, strict=True)]
        losses.append(everywhere(gloo, shares, section, queues)[0][1]["loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-9)


def piece(whole, rows: slice):
    names = ("queries", "documents", "query_keys", "document_keys", "weights", "scores", "momentum_queries")
    cut = {n: getattr(whole, n)[rows] for n in (*names, "momentum_documents")}
    return replace(whole, **cut, owners=torch.arange(rows.stop - rows.start))


@settings(max_examples=25)
@given(
    counts=st.tuples(st.integers(1, 6), st.integers(0, 5)),
    queued=st.integers(0, 15),
    tile=st.integers(1, 20),
    distinct=st.integers(1, 12),
    axis=st.sampled_from([a for a in AXES if a not in ("reference", "momentum positives")]),
)
def test_any_shape_mask_and_tile_equals_the_twin(counts, queued, tile, distinct, axis):
    b, hard = counts
    section = section_of(axis, tile=tile)
    shares = random_shares(1, [(b, b + hard)], DIM, distinct)
    queues = {"documents": random_rows(2, queued, DIM, distinct)} if queued else {}
    assert_equal(everywhere(None, shares, section, queues), twin(shares, section, queues))


def test_single_precision_is_right_to_rounding(gloo):
    section, queues = section_of("both directions", temperature=0.05), queues_of("both", 30)
    shares = random_shares(2, SPLITS["two"], DIM, distinct=30)
    assert_equal(everywhere(gloo, shares, section, queues, torch.float32), twin(shares, section, queues), 1e-5)


def test_bfloat16_rows_cost_the_gradient_a_rounding_and_the_loss_nothing(gloo):
    section, rows = section_of("both directions", tile=8), random_rows(3, 40, DIM)
    rounded = {"documents": replace(rows, vectors=rows.vectors.bfloat16())}
    shares = random_shares(2, SPLITS["one"], DIM)
    share = of_worker(shares[0], {}, 0, 1, torch.float32)
    result = Contrastive(section, Group())(replace(share, queues=rounded))
    result.loss.backward()
    dense = twin(shares, section, rounded)
    assert float(result.loss) == pytest.approx(dense.loss, rel=1e-5)
    assert (share.queries.grad - dense.query_gradients[0]).norm() / dense.query_gradients[0].norm() < 5e-3
    torch.testing.assert_close(share.documents.grad.double(), dense.document_gradients[0], rtol=1e-5, atol=1e-6)


def test_bfloat16_embeddings_equal_the_twin_of_the_rounded_ones(gloo):
    section = section_of("both directions")
    shares = [in_type(share, torch.bfloat16) for share in random_shares(2, SPLITS["two"], DIM)]
    ranks, dense = everywhere(gloo, shares, section, dtype=torch.bfloat16), twin(shares, section)
    assert sum(rank[0] for rank in ranks) == pytest.approx(dense.loss, rel=1e-4)
    for (_, _, queries, documents, _), q, d in zip(ranks, dense.query_gradients, dense.document_gradients, strict=True):
        assert queries.dtype == documents.dtype == torch.bfloat16
        assert (queries - q).norm() / q.norm() < 1e-2
        assert (documents - d).norm() / d.norm() < 1e-2


def test_a_query_with_nothing_to_compare_is_counted_and_has_no_gradient(gloo):
    shares = random_shares(3, [(3, 3), (1, 1)], DIM)
    same = [replace(s, query_keys=replace(s.query_keys, query_ids=torch.zeros_like(s.query_keys.query_ids)),
                    document_keys=replace(s.document_keys, query_ids=torch.zeros_like(s.document_keys.query_ids)))
            for s in shares]  # fmt: skip
    for loss, metrics, queries, documents, _ in everywhere(gloo, same, section_of("both directions")):
        assert (loss, metrics["loss"], metrics["nothing_to_compare"]) == (0, 0, 4)
        assert not queries.any()
        assert not documents.any()


def test_a_query_whose_targets_are_all_zero_leaves_the_mean_and_unknown_scores_are_those_of_any_pair(gloo):
    section = section_of("targets by scores")
    (share,) = random_shares(4, [(4, 6)], DIM)
    scores = torch.tensor([0.0, 0.3, torch.nan, 1.0, torch.nan, 0.5], dtype=torch.float64)
    share = replace(share, scores=scores, owners=torch.tensor([0, 1, 2, 3, 1, 2]))
    rejects = torch.cat([torch.full((4,), UNKNOWN), share.query_keys.query_ids[[1, 2]]])
    share = replace(share, document_keys=replace(share.document_keys, rejects=rejects))
    ranks = everywhere(gloo, [share], section)
    assert ranks[0][1]["nothing_to_compare"] == 1
    assert_equal(ranks, twin([share], section))
    with pytest.raises(ValueError, match="scores has -1: soft_targets needs scores that aren't negative"):
        everywhere(gloo, [replace(share, scores=scores - 1)], section)
    with pytest.raises(UsageError, match=r"objective\.soft_targets needs a score of each document"):
        everywhere(gloo, [replace(share, scores=None)], section)


def test_soft_targets_of_one_label_are_those_of_several_positives():
    """Where every label is like itself alone, the cross-entropy is that of SupCon with its sum outside."""
    (share,) = random_shares(6, [(6, 9)], DIM)
    alike = {"alike": [{"labels": [7, 8], "similarity": 0.5}]}  # labels that no text has
    soft = everywhere(None, [share], section_of("both directions", soft_targets=alike))[0]
    hard = everywhere(None, [share], section_of("supervised, outside"))[0]
    assert soft[0] == pytest.approx(hard[0])
    torch.testing.assert_close(soft[2:4], hard[2:4])


def test_a_wrong_number_of_queries_is_told():
    share = replace(random_shares(0, [(2, 2)], DIM)[0], global_queries=3)
    with pytest.raises(ValueError, match="global_queries is 3, the workers hold 2 queries on axis 0"):
        Contrastive(section_of("both directions"), Group())(share)


def test_a_mask_says_which_key_is_missing():
    share = random_shares(0, [(2, 2)], DIM)[0]
    share = replace(share, query_keys=replace(share.query_keys, labels=None))
    with pytest.raises(ValueError, match="a mask compares labels, and the query keys have none"):
        Contrastive(section_of("same label"), Group())(share)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"temperature": 0}, "a temperature of 0 is none to divide by"),
        ({"temperature": {"start": 0.1, "end": -1}}, "a temperature of -1 is none"),
        ({"among_queries": True}, "set `normalisation: joint`"),
        ({"positives": {}}, "set one of same_document"),
        ({"false_negatives": {}}, "exactly one of `margin`, `share` and `reference`"),
        ({"debiased": {}, "decoupled": True}, "debiased has its own denominator"),
        ({"positives": {"same_label": True}, "decoupled": True}, "positives goes with neither"),
        ({"soft_targets": {}}, "say which labels are `alike`, or set `scores`"),
        ({"soft_targets": {"scores": True}, "harder": 0.1}, "soft_targets says all of what a target is: remove harder"),
        ({"soft_targets": {"scores": True}, "normalisation": "joint"}, "set `normalisation: separate`"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, told):
    with pytest.raises(ValidationError, match=told):
        ContrastiveSection.model_validate(wrong)
