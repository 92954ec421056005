"""The exact hardest share of a block, per query, over all workers: its ceil(share * n)-th largest logit.

n is the number of candidates that no mask hides from the query. The threshold is found by radix selection: the logits'
bits, read as integers of the same order, are fixed eight at a time from the top, each time by a histogram of 256 bins
(B x 256 numbers, all-reduced) over the candidates that share the bits fixed so far. That is four passes over the
tiles in float32 (eight in float64), and as many over row numbers where candidates of equal logit straddle the
threshold: then the ones with lower numbers, the older, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.collectives import Group
from trainers.objectives.keys import Keys
from trainers.objectives.masks import HIDDEN

if TYPE_CHECKING:
    from trainers.objectives.blocks import Block, Exchange

DIGIT_BITS = 8
WITHOUT_DIGIT = (1 << (64 - DIGIT_BITS)) - 1  # an unsigned integer's other bits, once shifted as a signed one
# (integers to select from [B, t], which of them count [B, t]), tile by tile
Tiles = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Hardest:
    """Hides what is not among the hardest: below `floor` [B], or at it with a number above `newest` [B]."""

    floor: Tensor
    newest: Tensor
    symmetric = False

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        assert others.numbers is not None
        order, floor = ordered(logits), self.floor[:, None]
        late = (order == floor) & (others.numbers[None] > self.newest[:, None])
        logits.masked_fill_((order < floor) | late, HIDDEN)


def only_hardest(shared: Exchange, block: Block) -> Block:
    """The block with the mask that leaves the hardest `block.share` of it. Collective."""
    if block.keys.numbers is None:
        raise ValueError("the hardest share needs the candidates' numbers, by which ties are told apart")
    if block.fresh or block.columns:
        raise ValueError("the hardest share is of candidates without gradient: a queue")
    numbers, group = block.keys.numbers, shared.group

    def visible() -> Iterator[tuple[slice, Tensor]]:
        return ((tile.rows, tile.by_row.logits) for tile in shared.tiles(block, block.vectors))

    def logits() -> Iterator[tuple[Tensor, Tensor]]:
        return ((ordered(x), x != HIDDEN) for _, x in visible())

    valid = shared.queries.new_zeros(len(shared.queries), dtype=torch.int64)
    for _, x in visible():
        valid += (x != HIDDEN).sum(1)
    wanted = (group.all_reduce(valid).double() * block.share).ceil().long()
    bits = 64 if shared.queries.dtype == torch.float64 else 32
    floor, left, ties = kth_largest(logits, wanted, bits, group)
    newest = torch.full_like(floor, torch.iinfo(torch.int64).max)
    if bool((ties > left).any()):

        def tied() -> Iterator[tuple[Tensor, Tensor]]:
            for rows, x in visible():
                at_floor = (ordered(x) == floor[:, None]) & (x != HIDDEN)
                yield (-numbers[rows]).expand_as(at_floor), at_floor

        newest = -kth_largest(tied, left, 64, group)[0]
    return replace(block, masks=(*block.masks, Hardest(floor, newest)), share=1.0)


def ordered(x: Tensor) -> Tensor:
    """int64 of the order of floating-point x: its bits, those below the sign turned over where it is negative."""
    bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32).long()
    below_sign = 0x7FFFFFFFFFFFFFFF if x.dtype == torch.float64 else 0x7FFFFFFF
    return torch.where(bits < 0, bits ^ below_sign, bits)


def kth_largest(tiles: Tiles, k: Tensor, bits: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, over the tiles of all workers: (the k-th largest integer [B], how many equal to it are among the k
    largest [B], how many equal to it there are [B]). k [B], 0 where nothing counts. Collective."""
    prefix = torch.zeros_like(k)  # the bits fixed so far, of the integer less the smallest of its type
    left, found = k.clone(), torch.zeros_like(k)
    smallest = -(1 << (bits - 1))
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = prefix.new_zeros(len(prefix), 1 << DIGIT_BITS)
        for integers, counts in tiles():
            above = _unsigned_shift(integers ^ smallest, shift, bits)
            same = counts & (((above >> DIGIT_BITS) & WITHOUT_DIGIT) == prefix[:, None])
            histogram.scatter_add_(1, above & 0xFF, same.long())
        histogram = group.all_reduce(histogram)
        # From the largest digit down, the first at which the running count reaches what is left.
        reached = histogram.flip(1).cumsum(1)
        at = (reached < left[:, None]).sum(1).clamp(max=(1 << DIGIT_BITS) - 1)
        found = histogram.flip(1).gather(1, at[:, None])[:, 0]
        left = left - (reached.gather(1, at[:, None])[:, 0] - found)
        prefix = (prefix << DIGIT_BITS) | (255 - at)
    return prefix ^ smallest if bits == 64 else prefix + smallest, left, found


def _unsigned_shift(x: Tensor, by: int, bits: int) -> Tensor:
    """x >> by of an unsigned integer of so many bits, kept in int64."""
    if bits == 64:
        return (x >> by) & ((1 << (64 - by)) - 1) if by else x
    return (x & 0xFFFFFFFF) >> by
