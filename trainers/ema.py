"""The momentum encoder: an average of the weights over steps, kept in fp32 on the shards of the weights.

    average <- m * average + (1 - m) * weights, after each optimizer step        (MoCo, He et al. 2020, eq. 2)

In bf16 with m >= 0.999 most increments are below half an ulp and the average would stand still; hence fp32, on the
masters, with one cast to the compute type for the forward.

There is no second model. For its forward the averages stand under the parameters of the model that trains, and what
doesn't train is shared: beside a frozen base of billions of weights, the average of an adapter (A and B each) takes
the megabytes that the adapter takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config import MomentumConfig
from trainers.engine import Engine
from trainers.objectives.sections.numbers import value_at


class _Copies(Protocol):
    """The averages in the compute type, cut as the stage needs them.

    pairs     tensors of the model, and what stands under each of them in a momentum forward
    gathered  of these copies, what every worker holds whole
    """

    pairs: list[tuple[Tensor, Tensor]]
    gathered: list[Tensor]

    def fill(self, averages: Sequence[Tensor]) -> None:
        """From fp32 averages laid out like the engine's shards. Collective."""
        ...


class _FlatCopies:
    """ZeRO 0-2: parameters are views of one flat buffer a parameter group, filled by one all-gather each.

    At ZeRO-0 every worker averages everything and nothing is sent.
    """

    def __init__(self, engine: Engine, parameters: Mapping[str, nn.Parameter]) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        if engine.config.zero_stage == 0:
            rank, size = 0, 1
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._flat, self._mine, self._gathers = [], [], size > 1
        for shard in engine.shards:
            n = shard.tensor.numel()
            flat = torch.zeros(size * n, dtype=engine.compute_dtype, device=engine.device)
            for name, begin in shard.places.items():
                p = parameters[name]
                self.pairs.append((p, flat[begin : begin + p.numel()].view(p.shape)))
            self._flat.append(flat)
            self._mine.append(flat[rank * n : (rank + 1) * n])
        self.gathered = self._flat

    def fill(self, averages: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._mine, list(averages))
        if self._gathers:
            for flat, mine in zip(self._flat, self._mine, strict=True):
                dist.all_gather_into_tensor(flat, mine)


class _PartitionedCopies:
    """ZeRO-3: a partition beside each of the model's, gathered in a forward as those are.

    Only what the model keeps gathered (norms, biases, adapters) is sent at a fill, in one all-gather.
    """

    def __init__(self, engine: Engine, parameters: Mapping[str, Any]) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._flat, self._parts, wholes = [], [], []
        for shard in engine.shards:
            flat = torch.zeros(shard.tensor.shape, dtype=engine.compute_dtype, device=engine.device)
            for name, begin in shard.places.items():
                p = parameters[name]
                part = flat[begin : begin + p.partition_numel()]
                self.pairs.append((p.ds_tensor, part))
                if p.ds_persist:
                    whole = flat.new_zeros(dist.get_world_size(), len(part))
                    self.pairs.append((p, whole.view(-1)[: p.ds_numel].view(p.ds_shape)))
                    self._parts.append(part)
                    wholes.append(whole)
            self._flat.append(flat)
        self.gathered = wholes
        if wholes:
            lengths = [len(part) for part in self._parts]
            self._received = torch.cat(wholes, 1)
            self._wholes, self._columns = wholes, self._received.split(lengths, 1)

    def fill(self, averages: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._flat, list(averages))
        if self._parts:
            dist.all_gather_into_tensor(self._received.view(-1), torch.cat(self._parts))
            torch._foreach_copy_(self._wholes, self._columns)


class MomentumEncoder:
    """The averaged encoder of `engine`'s model; starts equal to it.

    It drops nothing unless `config.dropout`; then it draws from torch's generator, to be seeded as for the model.
    Buffers are those that the model had at the last update.
    """

    def __init__(self, engine: Engine, config: MomentumConfig) -> None:
        self._engine, self.config = engine, config
        parameters = {name: p for p, name in engine.names.items()}
        partitioned = engine.config.zero_stage == 3
        self._averages = [shard.tensor.clone() for shard in engine.shards]
        self._copies: _Copies = (_PartitionedCopies if partitioned else _FlatCopies)(engine, parameters)
        self._buffers = [(buffer, buffer.clone()) for buffer in engine.module.buffers()]
        with torch.no_grad():
            self._publish()

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """The model's forward with the averaged weights, for any texts. Collective at ZeRO-3."""
        with self._averages_in_place():
            return self._engine.forward(**inputs)

    @contextmanager
    def _averages_in_place(self) -> Iterator[None]:
        """Inside, the model's weights are the averages. Graphs that the model has built keep their own."""
        module = self._engine.module
        training = module.training
        self._engine.gather_afresh()
        with _standing_on([*self._copies.pairs, *self._buffers]):
            module.train(self.config.dropout)
            try:
                yield
            finally:
                module.train(training)
        self._engine.gather_afresh()

    @property
    def decay(self) -> float:
        """m of the step that the engine has done last, or does first."""
        done = max(0, self._engine.global_steps - 1)
        return value_at(self.config.decay, done / self._engine.total_steps)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights; call after each `engine.step()`. Collective."""
        masters = [shard.tensor for shard in self._engine.shards]
        torch._foreach_lerp_(self._averages, masters, 1 - self.decay)
        self._publish()

    def _publish(self) -> None:
        self._copies.fill(self._averages)
        for buffer, copy in self._buffers:
            copy.copy_(buffer)

    def replicas(self) -> list[Tensor]:
        """What every worker should hold alike: the copies that are gathered, at ZeRO-0 the averages."""
        return [*self._copies.gathered, *(self._averages if self._engine.config.zero_stage == 0 else [])]

    def state(self) -> dict[str, Tensor]:
        """This worker's share of the averages (`average/` + parameter name, 1-D fp32) and their `layout`."""
        sharding = self._engine.sharding
        return {"layout": sharding.layout(), **sharding.save("average", self._averages)}

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes up the states of all workers of an earlier run, in rank order; any number. Collective.

        Restore the engine first: buffers are its.
        """
        with torch.no_grad():
            self._engine.sharding.load("average", self._averages, states)
            self._publish()

    def full_weights(self) -> dict[str, Tensor]:
        """The averaged parameters and the buffers by name, as `Engine.full_weights`. Collective."""
        gathered = self._engine.sharding.gather(self._averages, self._engine.device)
        return self._engine.with_constants(gathered)


@contextmanager
def _standing_on(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the first tensor of each pair has the memory of the second."""
    own = [tensor.data for tensor, _ in pairs]
    for tensor, other in pairs:
        tensor.data = other
    try:
        yield
    finally:
        for (tensor, _), data in zip(pairs, own, strict=True):
            tensor.data = data
