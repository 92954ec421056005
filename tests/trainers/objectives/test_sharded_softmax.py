"""The exchange itself: reduced negatives and their gradients, tiles, similarities, the hardest share, traffic."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.twins import of_worker, random_rows, random_shares
from trainers.collectives import Group
from trainers.objectives.blocks import Block
from trainers.objectives.hardest import kth_largest, ordered
from trainers.objectives.keys import UNKNOWN, Keys
from trainers.objectives.masks import OtherClass, SameClass, SameId
from trainers.objectives.nats import Logit
from trainers.objectives.reductions import Running, Seen, Wanted, merge
from trainers.objectives.sharded_softmax import exchange
from trainers.objectives.similarity import InnerProduct, MaxSim, NegativeSquaredDistance

DIM = 8
MASKS = (SameId(),)


class LabelTargets:
    def of(self, these, others, dtype):
        return 0.5 * (these.labels[:, None] == others.labels[None]).to(dtype)


def reduce(share, rows=None, tile=5, columns=True, group=None, **options):
    blocks = [Block(share.documents, share.document_keys, MASKS, diagonal=True, columns=columns)]
    if rows is not None:
        blocks.append(Block(rows.vectors, replace(rows.keys, numbers=rows.numbers), MASKS, fresh=False))
    group = group or Group()
    return exchange(
        share.queries, share.query_keys, blocks, **{"temperature": 0.1, "tile": tile, "group": group} | options
    )


EVERYTHING = Wanted(scales=(0.5, 1.0), hardest=True, pointwise=Logit(), targets=LabelTargets(), count=True)


@pytest.mark.parametrize("wanted", [Wanted(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("score", [InnerProduct, NegativeSquaredDistance, MaxSim], ids=lambda s: s.__name__)
def test_the_operator_passes_gradcheck(score, wanted):
    tokens = 3 if score is MaxSim else 0
    share, rows = random_shares(0, [(4, 7)], DIM, tokens=tokens)[0], random_rows(1, 6, DIM, tokens=tokens)

    def reduced(queries, documents, temperature):
        seen = replace(share, queries=queries, documents=documents)
        found = reduce(seen, rows, temperature=temperature, score=score(), wanted=wanted)
        parts = found.rows.differentiable + found.columns.differentiable
        return tuple(x.where(x > -math.inf, 0) for x in (parts if wanted is EVERYTHING else parts[::5]))

    inputs = share.queries.requires_grad_(), share.documents.requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reduced, (*inputs, temperature), eps=1e-6, atol=1e-6)


def test_a_second_backward_finds_the_same_gradient():
    share, rows = random_shares(0, [(4, 7)], DIM)[0], random_rows(1, 6, DIM)
    queries = share.queries.requires_grad_()
    row = reduce(share, rows).rows.denominators
    first = torch.autograd.grad(row.sum(), queries, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(row.sum(), queries)[0])


@pytest.mark.parametrize("wanted", [Wanted(), EVERYTHING], ids=["plain", "everything"])
def test_the_size_of_a_tile_changes_nothing_but_rounding(wanted):
    whole, rows = random_shares(2, [(6, 11)], DIM, distinct=9)[0], random_rows(3, 13, DIM)
    results = []
    for tile in (1, 2, 3, 5, 6, 7, 11, 4096):
        share = of_worker(whole, {"documents": rows}, 0, 1, torch.float32)
        found = reduce(share, share.queues["documents"], tile, wanted=wanted)
        sides = [*found.rows.differentiable, *found.columns.differentiable]
        sum((x.clamp(min=-50).exp() if x.ndim > 1 else x.clamp(min=-5)).sum() for x in sides).log().backward()
        results.append([*(x.detach() for x in sides), share.queries.grad, share.documents.grad])
    for result in results[:-1]:
        for x, of_whole in zip(result, results[-1], strict=True):
            torch.testing.assert_close(x, of_whole, rtol=1e-4, atol=1e-5)


def test_a_running_sum_survives_logits_far_apart_and_tiles_that_are_all_masked():
    like, keys = torch.ones(2, 1), torch.tensor([[1.0], [2.0], [3.0]])
    running = Running(Wanted(), like, 2, width=1)
    logits = torch.tensor([[-torch.inf, -200.0, 300.0], [-torch.inf, -torch.inf, -torch.inf]])
    for j in range(3):
        tile = logits[:, j : j + 1].clone()
        running.add(Seen(tile, tile), keys[j : j + 1])
    reduced, parts = merge([running], None)
    assert reduced.denominators.tolist() == parts.tolist() == [[300.0, -torch.inf]]
    assert running.values.tolist() == [[3.0], [0.0]]


def test_an_unknown_class_equals_nothing_and_is_no_other_class_either():
    keys = Keys(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), tasks=torch.tensor([7, 8, UNKNOWN]))
    for mask, hidden in ((SameClass("tasks"), [[1, 0, 0], [0, 1, 0], [0, 0, 0]]),
                         (OtherClass("tasks"), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])):  # fmt: skip
        logits = torch.zeros(3, 3)
        mask.apply(logits, keys, keys)
        assert (logits == -torch.inf).int().tolist() == hidden


# The hardest share.


@settings(max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.data())
def test_the_kth_largest_is_that_of_a_sorted_list(values, data):
    x = torch.tensor([values], dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    order = ordered(x)
    found, left, ties = kth_largest(
        lambda: iter([(order, torch.ones_like(order, dtype=torch.bool))]), torch.tensor([k]), 32, Group()
    )
    wanted = sorted(order[0].tolist(), reverse=True)
    assert found.item() == wanted[k - 1]
    assert ties.item() == wanted.count(wanted[k - 1])
    assert left.item() == k - sum(w > wanted[k - 1] for w in wanted)


def test_bits_keep_the_order_of_numbers():
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-torch.inf, -1e30, -1.0, -1e-40, 0.0, 1e-40, 0.5, 1e30, torch.inf], dtype=dtype)
        assert (ordered(x).diff() > 0).all()


def _hardest_rows(equal):
    """Which of 40 rows over the workers count for each query: their part of the denominator."""
    group = Group()
    share = random_shares(3, [(5, 5)] + [(0, 0)] * (group.size - 1), DIM)[group.rank]
    rows = random_rows(4, 40, DIM)
    if equal:  # ties over workers, told apart by number
        rows = replace(rows, vectors=rows.vectors[:1].expand(40, -1).clone())
    mine = slice(group.rank, None, group.size)
    keys = replace(rows.keys, numbers=rows.numbers)[mine]
    block = Block(rows.vectors[mine], keys, fresh=False, share=0.25)
    found = exchange(
        share.queries, share.query_keys, [block], temperature=0.1, tile=7, group=group, wanted=Wanted(count=True)
    )
    logits = share.queries @ rows.vectors.T / 0.1
    return found.rows.count, found.rows.denominators[0], logits.topk(10, dim=1).values.logsumexp(1)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_exactly_the_hardest_share_counts_over_all_workers(gloo, world_size, equal):
    count, denominator, expected = gloo(world_size, _hardest_rows, equal)[0]
    assert count.tolist() == [10] * 5
    torch.testing.assert_close(denominator, expected)


# Shapes, and what is sent.


def test_shapes_that_disagree_are_told():
    share, group = random_shares(0, [(3, 4)], DIM)[0], Group()

    def told(block, keys=share.query_keys):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the caller looks at what it says
            exchange(share.queries, keys, [block], temperature=1.0, tile=4, group=group)
        return str(error.value)

    documents, keys = share.documents, share.document_keys
    assert "candidates are [4, 5], queries [3, 8]" in told(Block(documents[:, :5], keys))
    assert told(Block(documents, keys), share.query_keys[:2]) == "keys: 2 rows for 3 queries on axis 0"
    assert told(Block(documents, keys[:3])) == "keys: 3 rows for 4 candidates on axis 0"


def _step_traffic(hard, queued, columns):
    group, b = Group(), 4
    counts = [(b, b + hard)] * group.size
    share = random_shares(group.rank, counts, DIM)[group.rank]
    keys = Keys(share.query_keys.query_ids, share.query_keys.document_ids)
    queues = {"documents": random_rows(9, queued, DIM)}
    share = replace(of_worker(share, queues, group.rank, group.size, torch.float32), query_keys=keys)
    group.reset_traffic()
    found = reduce(share, share.queues["documents"], 16, columns, group)
    (found.rows.denominators.sum() + found.columns.denominators.sum()).backward()
    return group.traffic, group.messages


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_and_messages_know_neither_queue_nor_hard_negatives_nor_directions(gloo, world_size):
    plain = gloo(world_size, _step_traffic, 0, 0, False)
    for hard, queued, columns in ((0, 500, False), (7, 0, False), (0, 0, True), (7, 500, True)):
        assert gloo(world_size, _step_traffic, hard, queued, columns) == plain
    b, others, number = 4, world_size - 1, 4  # float32
    keys_and_scalars = others * (b * 2 * 8 + b * number + 8)  # ids, dL/drow, sizes
    for traffic, messages in plain:
        assert traffic["all_gather"] == others * b * DIM * number + keys_and_scalars
        assert traffic["reduce_scatter"] == others * b * DIM * number
        # sizes; queries and keys; dL/drow. A training step knows the sizes.
        assert messages == {"all_gather": 3, "all_reduce": 2, "reduce_scatter": 1}
        assert traffic["all_reduce"] == 3 * 2 * others * b * number  # a maximum, and a sum of each of two blocks
