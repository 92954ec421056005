"""The loss and its gradients equal the dense float64 twin at any split over workers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.twins import Share, dense_contrastive, random_rows, random_shares, rows_of_worker
from trainers.collectives import Group
from trainers.config import ObjectiveConfig
from trainers.negative_queue import NO_QUERY, QueueRows
from trainers.objectives.contrastive import Contrastive, Ids

DIM = 16
# (b, d) of each worker: even and uneven, one without hard negatives, one without queries, one with nothing
SPLITS = {
    "one": [(7, 11)],
    "two": [(4, 9), (3, 3)],
    "three": [(5, 8), (0, 2), (2, 2)],
    "three, one idle": [(3, 3), (4, 6), (0, 0)],
}


def _run(shares, config, rows, dtype, row_dtype):
    """On a rank: (loss share, metrics, dL/dqueries, dL/ddocuments)."""
    group = Group()
    share = shares[group.rank].to(dtype)
    queries, documents = share.queries.requires_grad_(), share.documents.requires_grad_()
    mine = None if rows is None else rows_of_worker(rows, group.rank, group.size, row_dtype)
    total = sum(len(s.queries) for s in shares)
    result = Contrastive(config, group)(queries, documents, share.ids, total, mine)
    result.loss.backward()
    return float(result.loss), result.metrics, queries.grad, documents.grad


def _everywhere(gloo, shares, config, rows, dtype=torch.float32, row_dtype=torch.float32):
    arguments = shares, config, rows, dtype, row_dtype
    return [_run(*arguments)] if len(shares) == 1 else gloo(len(shares), _run, *arguments)


def _assert_equal(ranks, twin, loss_tolerance=1e-5, gradient_tolerance=1e-6):
    assert sum(loss for loss, *_ in ranks) == pytest.approx(twin.loss, rel=loss_tolerance, abs=1e-7)
    for rank, (_, metrics, queries, documents) in enumerate(ranks):
        assert metrics == pytest.approx(twin.metrics, rel=10 * loss_tolerance, abs=1e-5)
        for found, expected in (
            (queries, twin.query_gradients[rank]),
            (documents, twin.document_gradients[rank]),
        ):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=gradient_tolerance)


@pytest.mark.parametrize("queued", [0, 23], ids=["no queue", "queue"])
@pytest.mark.parametrize("directions", ["both", "query_to_document"])
@pytest.mark.parametrize("split", SPLITS)
def test_loss_gradients_and_metrics_equal_the_dense_twin_at_any_split(gloo, split, directions, queued):
    config = ObjectiveConfig(temperature=0.1, directions=directions, tile=3)
    rows = random_rows(5, queued, DIM, distinct=30) if queued else None
    shares = random_shares(4, SPLITS[split], DIM, distinct=30)
    _assert_equal(_everywhere(gloo, shares, config, rows), dense_contrastive(shares, config, rows))


@pytest.mark.parametrize("same_document", [True, False])
@pytest.mark.parametrize("same_query", [True, False])
def test_duplicates_on_any_worker_and_in_the_queue_are_masked(gloo, same_document, same_query):
    config = ObjectiveConfig(temperature=0.2, mask_same_document=same_document, mask_same_query=same_query, tile=4)
    shares, rows = random_shares(6, SPLITS["three"], DIM, distinct=4), random_rows(7, 20, DIM, distinct=4)
    _assert_equal(_everywhere(gloo, shares, config, rows), dense_contrastive(shares, config, rows))


def test_the_loss_does_not_know_how_the_batch_was_split(gloo):
    config, rows = ObjectiveConfig(temperature=0.05), random_rows(1, 32, DIM)
    whole = random_shares(8, [(6, 6)], DIM)[0]
    losses = []
    for cuts in ([6], [3, 3], [1, 5], [2, 0, 4]):
        pieces = zip(*(x.split(cuts) for x in (whole.queries, whole.documents)), strict=True)
        ids = zip(*(x.split(cuts) for x in (whole.ids.query_ids, whole.ids.document_ids)), strict=True)
        shares = [Share(q, d, Ids(*i)) for (q, d), i in zip(pieces, ids, strict=True)]
        losses.append(_everywhere(gloo, shares, config, rows)[0][1]["loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_bfloat16_rows_cost_the_gradient_a_rounding_and_the_loss_nothing(gloo):
    config = ObjectiveConfig(temperature=0.1, tile=8)
    shares, rows = random_shares(2, SPLITS["two"], DIM), random_rows(3, 40, DIM)
    rounded = rows_of_worker(rows, 0, 1, torch.bfloat16)
    ranks = _everywhere(gloo, shares, config, rows, row_dtype=torch.bfloat16)
    twin = dense_contrastive(shares, config, rounded)
    assert sum(loss for loss, *_ in ranks) == pytest.approx(twin.loss, rel=1e-5)
    for (_, _, queries, documents), q, d in zip(ranks, twin.query_gradients, twin.document_gradients, strict=True):
        assert (queries - q).norm() / q.norm() < 5e-3
        torch.testing.assert_close(documents.double(), d, rtol=1e-5, atol=1e-6)


def test_bfloat16_embeddings_equal_the_twin_of_the_rounded_ones(gloo):
    config = ObjectiveConfig(temperature=0.1)
    shares = [share.to(torch.bfloat16) for share in random_shares(2, SPLITS["two"], DIM)]
    ranks = _everywhere(gloo, shares, config, None, dtype=torch.bfloat16)
    twin = dense_contrastive(shares, config, None)
    assert sum(loss for loss, *_ in ranks) == pytest.approx(twin.loss, rel=1e-5)
    for (_, _, queries, documents), q, d in zip(ranks, twin.query_gradients, twin.document_gradients, strict=True):
        assert queries.dtype == documents.dtype == torch.bfloat16
        assert (queries - q).norm() / q.norm() < 5e-3
        assert (documents - d).norm() / d.norm() < 5e-3


def test_queries_with_nothing_to_compare_are_counted_and_leave_the_mean(gloo):
    config = ObjectiveConfig(temperature=0.1)
    shares = random_shares(3, [(3, 3), (1, 1)], DIM)
    copies = torch.tensor([5, 5, 5])
    alone = [Share(shares[0].queries, shares[0].documents, Ids(torch.arange(3), copies))]
    ((loss, metrics, queries, documents),) = _everywhere(gloo, alone, config, None)
    assert (loss, metrics["loss"], metrics["nothing_to_compare"]) == (0.0, 0.0, 3.0)
    assert not queries.any()
    assert not documents.any()
    # beside a fourth copy and one queue row of query 1, queries 0 and 2 and the fourth have that row
    mixed = [alone[0], Share(shares[1].queries, shares[1].documents, Ids(copies[:1], copies[:1]))]
    rows = QueueRows(shares[1].documents, copies[:1] + 1, torch.tensor([1]), torch.tensor([0]))
    ranks = _everywhere(gloo, mixed, config, rows)
    assert ranks[0][1]["nothing_to_compare"] == 1.0  # the query whose id the only queue row carries
    _assert_equal(ranks, dense_contrastive(mixed, config, rows))


def test_an_empty_queue_equals_no_queue():
    config, shares = ObjectiveConfig(), random_shares(3, [(4, 5)], DIM)
    without = _run(shares, config, None, torch.float32, torch.float32)
    empty = _run(shares, config, random_rows(0, 0, DIM), torch.float32, torch.float32)
    assert without[:2] == empty[:2]
    assert torch.equal(without[2], empty[2])


def test_documents_without_gradient_leave_the_queries_gradient_as_it_is():
    share, config = random_shares(3, [(4, 5)], DIM)[0], ObjectiveConfig()
    queries = share.queries.requires_grad_()
    Contrastive(config, Group())(queries, share.documents, share.ids, 4, None).loss.backward()
    expected = dense_contrastive([share], config, None).query_gradients[0]
    torch.testing.assert_close(queries.grad, expected)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(0, 6),
    hard=st.integers(0, 5),
    queued=st.integers(0, 9),
    tile=st.integers(1, 12),
    distinct=st.sampled_from([1, 2, 4, 10**6]),
    directions=st.sampled_from(["both", "query_to_document"]),
    flags=st.tuples(st.booleans(), st.booleans()),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_mask_and_tile_equals_the_twin(b, hard, queued, tile, distinct, directions, flags, temperature, seed):
    config = ObjectiveConfig(
        temperature=temperature,
        directions=directions,
        mask_same_document=flags[0],
        mask_same_query=flags[1],
        tile=tile,
    )
    shares = random_shares(seed, [(b, b + hard)], 4, distinct)
    rows = random_rows(seed + 2, queued, 4, distinct) if queued else None
    if b == 0:  # the mean over no queries; the twin's statistics of pairs are not defined
        assert _run(shares, config, rows, torch.float64, torch.float64)[0] == 0.0
        return
    _assert_equal([_run(shares, config, rows, torch.float64, torch.float64)], dense_contrastive(shares, config, rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(3, DIM + 1)}, r"queries and documents are \[3, 17\] and \[5, 16\]"),
        ({"documents": torch.zeros(2, DIM)}, "2 documents for 3 queries"),
        ({"ids": Ids(torch.zeros(2), torch.zeros(5))}, r"query_ids \[2\] for 3 queries"),
        ({"ids": Ids(torch.zeros(3), torch.zeros(4))}, r"document_ids \[4\] for 5 documents"),
        ({"queue": random_rows(0, 2, DIM + 1)}, "queue rows are 17 wide, queries 16"),
        ({"global_queries": 4}, "global_queries is 4, the workers hold 3 queries"),
    ],
)
def test_shapes_that_disagree_are_named_with_both_values(change, message):
    share = random_shares(0, [(3, 5)], DIM)[0]
    right = {"queries": share.queries, "documents": share.documents, "ids": share.ids}
    with pytest.raises(ValueError, match=message):
        Contrastive(ObjectiveConfig(), Group())(**right | {"global_queries": 3, "queue": None} | change)


def test_a_row_that_answers_no_query_is_nobodys_duplicate():
    share, config = random_shares(0, [(2, 2)], DIM)[0], ObjectiveConfig(temperature=0.5)
    row = random_rows(1, 1, DIM)
    assert row.query_ids.tolist() == [NO_QUERY]
    result = Contrastive(config, Group())(share.queries, share.documents, share.ids, 2, row)
    assert result.metrics["queue_hardness"] > 0
