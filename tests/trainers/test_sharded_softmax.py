"""The exchange itself: reduced negatives and their gradients, tiles, masks, traffic."""

import pytest
import torch

from tests.twins import random_rows, random_shares, rows_of_worker
from trainers.collectives import Group
from trainers.objectives.sharded_softmax import (
    Candidates,
    InnerProduct,
    Keys,
    RunningLogSumExp,
    SameIdMask,
    sharded_softmax,
)

SCORE, DIM = InnerProduct(0.1), 8


def _negatives(queries, documents, ids, rows=None, tile=5, columns=True):
    stored = None if rows is None else Candidates(rows.vectors, Keys(rows.query_ids, rows.document_ids))
    b = len(queries)
    answers = torch.full((len(documents),), -(2**63))
    answers[:b] = ids.query_ids
    return sharded_softmax(
        queries,
        documents,
        Keys(ids.query_ids, ids.document_ids[:b]),
        Keys(answers, ids.document_ids),
        stored,
        score=SCORE,
        mask=SameIdMask(True, True),
        tile=tile,
        columns=columns,
        group=Group(),
    )


def test_the_operator_passes_gradcheck():
    share, rows = random_shares(0, [(4, 7)], DIM)[0], random_rows(1, 6, DIM)

    def reduced(queries, documents):
        negatives = _negatives(queries, documents, share.ids, rows)
        return negatives.row, negatives.column

    inputs = share.queries.requires_grad_(), share.documents.requires_grad_()
    assert torch.autograd.gradcheck(reduced, inputs, eps=1e-6, atol=1e-7)


def test_a_second_backward_finds_the_same_gradient():
    share, rows = random_shares(0, [(4, 7)], DIM)[0], random_rows(1, 6, DIM)
    queries = share.queries.requires_grad_()
    row = _negatives(queries, share.documents, share.ids, rows).row
    first = torch.autograd.grad(row.sum(), queries, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(row.sum(), queries)[0])


def test_the_size_of_a_tile_changes_nothing_but_rounding():
    share, rows = random_shares(2, [(6, 11)], DIM, distinct=9)[0].to(torch.float32), random_rows(3, 13, DIM)
    rows = rows_of_worker(rows, 0, 1, torch.float32)
    results = []
    for tile in (1, 2, 3, 5, 6, 7, 11, 4096):
        queries = share.queries.clone().requires_grad_()
        documents = share.documents.clone().requires_grad_()
        negatives = _negatives(queries, documents, share.ids, rows, tile)
        (negatives.row.exp().sum() + negatives.column.exp().sum()).log().backward()
        results.append((negatives.row.detach(), negatives.column.detach(), queries.grad, documents.grad))
    for result in results[:-1]:
        for x, whole in zip(result, results[-1], strict=True):
            torch.testing.assert_close(x, whole, rtol=1e-5, atol=1e-6)


def test_a_running_sum_survives_logits_far_apart_and_tiles_that_are_all_masked():
    queries, keys = torch.ones(2, 1), torch.tensor([[1.0], [2.0], [3.0]])
    running = RunningLogSumExp(queries, keep_values=True)
    logits = torch.tensor([[-torch.inf, -200.0, 300.0], [-torch.inf, -torch.inf, -torch.inf]])
    for j in range(3):
        running.add(logits[:, j : j + 1].clone(), keys[j : j + 1])
    assert running.maximum.tolist() == [300.0, -torch.inf]
    assert running.total.tolist() == [1.0, 0.0]
    assert running.values.tolist() == [[3.0], [0.0]]


def test_hidden_candidates_are_named_by_document_and_by_query():
    queries = Keys(torch.tensor([1, 2]), torch.tensor([10, 20]))
    candidates = Keys(torch.tensor([1, 9, 9]), torch.tensor([30, 20, 40]))
    for same_document, same_query, expected in (
        (False, False, [[False, False, False], [False, False, False]]),
        (True, False, [[False, False, False], [False, True, False]]),
        (False, True, [[True, False, False], [False, False, False]]),
        (True, True, [[True, False, False], [False, True, False]]),
    ):
        logits = torch.zeros(2, 3)
        SameIdMask(same_document, same_query).hide(logits, queries, candidates)
        assert (logits == -torch.inf).tolist() == expected


def _step_traffic(hard: int, queued: int, columns: bool):
    group, b = Group(), 4
    share = random_shares(group.rank, [(b, b + hard)], DIM)[0].to(torch.float32)
    rows = rows_of_worker(random_rows(9, queued, DIM), group.rank, group.size, torch.float32)
    queries, ids = share.queries.requires_grad_(), share.ids
    answers = torch.zeros(b + hard, dtype=torch.int64)
    negatives = sharded_softmax(
        queries,
        share.documents.requires_grad_(),
        Keys(ids.query_ids, ids.document_ids[:b]),
        Keys(answers, ids.document_ids),
        Candidates(rows.vectors, Keys(rows.query_ids, rows.document_ids)),
        score=SCORE,
        mask=SameIdMask(True, True),
        tile=16,
        columns=columns,
        group=group,
    )
    (negatives.row.sum() + negatives.column.sum() * columns).backward()
    return group.traffic


@pytest.mark.parametrize("world_size", [2, 3])
def test_traffic_knows_neither_queue_nor_hard_negatives_nor_directions(gloo, world_size):
    plain = gloo(world_size, _step_traffic, 0, 0, False)
    for hard, queued, columns in ((0, 500, False), (7, 0, False), (0, 0, True), (7, 500, True)):
        assert gloo(world_size, _step_traffic, hard, queued, columns) == plain
    b, others, number = 4, world_size - 1, 4  # float32
    keys_and_scalars = others * (b * 2 * 8 + b * number + 8)  # ids, dL/drow, sizes
    for traffic in plain:
        assert traffic["all_gather"] == others * b * DIM * number + keys_and_scalars
        assert traffic["reduce_scatter"] == others * b * DIM * number
        assert traffic["all_reduce"] == 3 * 2 * others * b * number  # a maximum and two sums of B
