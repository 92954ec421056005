"""Which elements of which parameter a worker holds in fp32, and how such tensors are saved, restored and gathered.

DeepSpeed cuts parameters its own way at every ZeRO stage. Here each cut is written down once, as shards made of
pieces, and everything that travels (checkpoints, exports) is keyed by parameter name instead: a state saved at
one stage and number of workers is restored at any other, and the same one gets its own bytes back.

Legend: n elements of a shard (padding included), P trainable parameters, W workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_services.schema import RunError


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of the flattened parameter `name`, at [offset, offset + length) of a shard."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """fp32 master weights on this worker, updated in place by the optimizer.

    master  the leaf tensor the optimizer steps, of any shape
    pieces  what lies in it
    places  of each parameter. ZeRO 0-2: where it begins in the shards of all workers laid end to end;
            ZeRO-3: where each worker's part of it, padding included, begins in that worker's shard
    """

    master: Tensor
    pieces: tuple[Piece, ...]
    places: Mapping[str, int]

    @property
    def tensor(self) -> Tensor:
        """[n] view of the master weights, without gradient."""
        return self.master.detach().view(-1)


def replicated_shards(names: Mapping[nn.Parameter, str], masters: Mapping[nn.Parameter, Tensor]) -> list[Shard]:
    """ZeRO-0: every worker holds every parameter, each a shard of its own."""
    return [Shard(master, (Piece(names[p], 0, p.numel(), 0),), {names[p]: 0}) for p, master in masters.items()]


def flat_shards(names: Mapping[nn.Parameter, str], zero: Any, rank: int) -> list[Shard]:
    """ZeRO-1/2: each parameter group is laid end to end and cut into W equal parts, padded at the end."""
    shards = []
    for parameters, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        low = rank * master.numel()
        high, begin, pieces, places = low + master.numel(), 0, [], {}
        for p in parameters:
            end, places[names[p]] = begin + p.numel(), begin
            first, last = max(begin, low), min(end, high)
            if first < last:
                pieces.append(Piece(names[p], first - begin, last - first, first - low))
            begin = end
        shards.append(Shard(master, tuple(pieces), places))
    return shards


def partitioned_shards(names: Mapping[nn.Parameter, str], zero: Any, rank: int) -> list[Shard]:
    """ZeRO-3: each parameter is cut into W equal parts, padded at the end; a shard lays this worker's end to end."""
    shards = []
    for parameters, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset, pieces, places = 0, [], {}
        for p in parameters:
            part, places[names[p]] = p.partition_numel(), offset
            start = rank * part
            if start < p.ds_numel:
                pieces.append(Piece(names[p], start, min(part, p.ds_numel - start), offset))
            offset += part
        shards.append(Shard(master, tuple(pieces), places))
    return shards


class Sharding:
    """The shards of one worker, and lists of tensors laid out like them (weights, moments, averages).

    shapes  shape of every trainable parameter, in the model's order, equal on all workers
    shards  this worker's, covering each parameter exactly once over the workers that are `owner`
    owner   False where another worker holds the same elements and answers for them (ZeRO-0, rank > 0)
    """

    def __init__(self, shapes: Mapping[str, torch.Size], shards: Sequence[Shard], owner: bool) -> None:
        self.shapes, self.shards, self.owner = dict(shapes), list(shards), owner

    def _slices(self, tensors: Sequence[Tensor]) -> list[tuple[Piece, Tensor]]:
        return [
            (piece, tensor.view(-1)[piece.offset : piece.offset + piece.length])
            for shard, tensor in zip(self.shards, tensors, strict=True)
            for piece in shard.pieces
        ]

    def layout(self) -> Tensor:
        """[P, 3] int64: start, length and whole size of what this worker answers for of each parameter."""
        rows = {name: [0, 0, shape.numel()] for name, shape in self.shapes.items()}
        if self.owner:
            for piece, _ in self._slices([shard.tensor for shard in self.shards]):
                rows[piece.name][:2] = piece.start, piece.length
        return torch.tensor(list(rows.values()), dtype=torch.int64).view(-1, 3)

    def save(self, kind: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """CPU copies of what this worker answers for, keyed `kind/parameter name`, each 1-D and without padding."""
        if not self.owner:
            return {}
        return {f"{kind}/{piece.name}": part.detach().to("cpu", copy=True) for piece, part in self._slices(tensors)}

    def load(self, kind: str, tensors: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Fills `tensors` in place from the states of all old workers, each with its `layout`.

        Only the entries that overlap this worker's shards are read. Raises RunError where the states don't cover
        a parameter, or another size of it.
        """
        states = self._needed(states)
        layouts = [state["layout"].tolist() for state in states]
        index = {name: i for i, name in enumerate(self.shapes)}
        if any(len(layout) != len(index) for layout in layouts):
            raise RunError(
                f"the checkpoint holds {len(layouts[0])} parameters and this model has {len(index)}: "
                "resume with the model it was made with"
            )
        for piece, part in self._slices(tensors):
            key, end, found = f"{kind}/{piece.name}", piece.start + piece.length, 0
            for state, layout in zip(states, layouts, strict=True):
                start, length, size = layout[index[piece.name]]
                first, last = max(start, piece.start), min(start + length, end)
                if first < last and key in state and size == self.shapes[piece.name].numel():
                    part[first - piece.start : last - piece.start].copy_(state[key][first - start : last - start])
                    found += last - first
            if found != piece.length:
                raise RunError(
                    f"the checkpoint has {found} of the {piece.length} elements of {key} that this worker needs: "
                    "resume with the model it was made with"
                )

    def _needed(self, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Mapping[str, Tensor]]:
        """One state, where one has all that this worker needs: of a thousand files each worker opens one or two."""
        first = states[0]["layout"]
        if torch.equal(first[:, 1], first[:, 2]):  # one worker had everything
            return states[:1]
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        same = len(states) == size and torch.equal(states[rank]["layout"], self.layout())
        return [states[rank]] if same else states

    def gather(self, tensors: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
        """Whole parameters by name, fp32 on the CPU of rank 0, {} elsewhere. Collective, one parameter at a time."""
        mine = {piece.name: (piece, part) for piece, part in self._slices(tensors)} if self.owner else {}
        whole = {}
        for name, shape in self.shapes.items():
            full = torch.zeros(shape.numel(), dtype=torch.float32, device=device)
            if name in mine:
                piece, part = mine[name]
                full[piece.start : piece.start + piece.length].copy_(part)
            dist.reduce(full, dst=0)
            if dist.get_rank() == 0:
                whole[name] = full.view(shape).cpu()
        return whole
