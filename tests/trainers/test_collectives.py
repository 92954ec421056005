"""Collectives: uneven blocks, sums, and the bytes they are said to move."""

import pytest
import torch

from trainers.collectives import Group, engine_gradient_scale

SIZES = [3, 0, 2]
DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def _block(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(rows * 4).reshape(rows, 2, 2) + 100 * rank).to(dtype)


def _gathered(dtype):
    group = Group()
    block = _block(group.rank, SIZES[group.rank], dtype)
    return group.all_gather(block), group.all_gather(block, SIZES)


def _gathered_together():
    """Columns of types whose sizes don't divide each other, one of them of 5 bytes a row."""
    group, n = Group(), SIZES[Group().rank]
    columns = [_block(group.rank, n, dtype) for dtype in DTYPES]
    columns.insert(1, torch.arange(5 * n, dtype=torch.uint8).view(n, 5) + group.rank)
    columns.append(torch.arange(n) == 1)
    apart = [group.all_gather(column, SIZES) for column in columns]
    group.reset_traffic()
    return apart, group.all_gather_together(columns, SIZES), group.messages, group.traffic


def _scattered(dtype):
    group = Group()
    return group.reduce_scatter(_block(group.rank, sum(SIZES), dtype), SIZES)


def _small():
    group = Group()
    x = torch.tensor([float(group.rank), -1.0])
    reduced = [group.all_reduce(x, op).tolist() for op in ("sum", "max", "min")]
    group.barrier()
    decided = group.broadcast_object({"save": group.rank == 0})
    return reduced, x.tolist(), decided, group.sizes(group.rank + 5)


def _traffic():
    group = Group()
    group.all_gather(torch.zeros(SIZES[group.rank], 2), SIZES)
    group.reduce_scatter(torch.zeros(sum(SIZES), 2), SIZES)
    group.all_reduce(torch.zeros(6))
    counted = group.traffic
    group.reset_traffic()
    return counted, group.traffic


def _wrong_sizes():
    group = Group()
    messages = []
    for call in (
        lambda: group.all_gather(torch.zeros(1, 2), [1]),
        lambda: group.all_gather(torch.zeros(9, 2), SIZES),
        lambda: group.reduce_scatter(torch.zeros(4, 2), SIZES),
    ):
        with pytest.raises(ValueError, match="sizes") as caught:
            call()
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gather_keeps_uneven_blocks_in_rank_order(gloo, dtype):
    whole = torch.cat([_block(rank, rows, dtype) for rank, rows in enumerate(SIZES)])
    for found, with_sizes in gloo(3, _gathered, dtype):
        assert torch.equal(found, whole)
        assert torch.equal(with_sizes, whole)


def test_columns_gathered_together_are_those_gathered_apart_in_one_message(gloo):
    for apart, together, messages, traffic in gloo(3, _gathered_together):
        for found, expected in zip(together, apart, strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
        assert messages == {"all_gather": 1}
        assert traffic == {"all_gather": 2 * 3 * (4 * 4 + 5 + 4 * 2 + 4 * 8 + 1)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_leaves_each_worker_its_block_of_the_sum(gloo, dtype):
    total = sum(_block(rank, sum(SIZES), dtype) for rank in range(3))
    for own, expected in zip(gloo(3, _scattered, dtype), total.split(SIZES), strict=True):
        assert torch.equal(own, expected)


def test_reductions_and_decisions_agree_everywhere_and_leave_the_argument_alone(gloo):
    for rank, (reduced, argument, decided, sizes) in enumerate(gloo(3, _small)):
        assert reduced == [[3.0, -3.0], [2.0, -1.0], [0.0, -1.0]]
        assert argument == [float(rank), -1.0]
        assert decided == {"save": True}
        assert sizes == [5, 6, 7]


def test_traffic_follows_the_documented_formulas(gloo):
    row = 2 * 4  # bytes
    for rank, (counted, after_reset) in enumerate(gloo(3, _traffic)):
        assert counted == {
            "all_gather": 2 * 3 * row,
            "reduce_scatter": (5 - SIZES[rank]) * row,
            "all_reduce": 2 * 24 * 2 // 3,
        }
        assert after_reset == {}


def test_sizes_that_do_not_fit_name_both_values(gloo):
    short, _, scattered = gloo(3, _wrong_sizes)[0]
    assert short == "all_gather: 1 sizes for 3 workers"
    assert scattered == "reduce_scatter: sizes add up to 5 rows, x has 4 on axis 0"


def test_a_world_of_one_needs_no_process_group():
    group, x = Group(), torch.arange(6.0).reshape(3, 2)
    assert (group.rank, group.size) == (0, 1)
    for same in (group.all_gather(x), group.reduce_scatter(x, [3]), group.all_reduce(x, "max")):
        assert torch.equal(same, x)
    assert group.broadcast_object("x") == "x"
    assert group.sizes(3) == [3]
    assert group.traffic == {}


def test_an_averaging_engine_is_given_world_size_times_the_gradient():
    assert engine_gradient_scale(4) == 4.0
