"""The momentum encoder: an average of the weights over steps, kept in fp32 on the shards of the weights.

    average <- m * average + (1 - m) * weights, after each optimizer step        (MoCo, He et al. 2020, eq. 2)

In bf16 with m >= 0.999 most increments are below half an ulp and the average would stand still; hence fp32, on the
masters, with one cast to the compute type for the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.config import MomentumConfig
from trainers.engine import Engine, initialize


class _Teacher(Protocol):
    """A copy of the model whose weights are set from averages laid out like the engine's shards."""

    def publish(self, averages: Sequence[Tensor]) -> None: ...

    def forward(self, **inputs: Any) -> Any: ...


class _FlatTeacher:
    """ZeRO 0-2: parameters are views of one flat buffer a parameter group, filled by one all-gather each.

    At ZeRO-0 every worker averages everything and nothing is sent.
    """

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        if engine.config.zero_stage == 0:
            rank, size = 0, 1
        self._gathers = size > 1
        parameters = dict(model.named_parameters())
        self._flat, self._mine = [], []
        for shard in engine.shards:
            n = shard.tensor.numel()
            flat = torch.zeros(size * n, dtype=engine.compute_dtype, device=engine.device)
            for name, begin in shard.places.items():
                p = parameters.pop(name)
                p.data = flat[begin : begin + p.numel()].view(p.shape)
            self._flat.append(flat)
            self._mine.append(flat[rank * n : (rank + 1) * n])
        frozen = {name: p for p, name in engine.names.items() if not p.requires_grad}
        for name, p in parameters.items():
            p.data = frozen[name].data
        self._model = model.to(engine.device)

    def publish(self, averages: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._mine, list(averages))
        if self._gathers:
            for flat, mine in zip(self._flat, self._mine, strict=True):
                dist.all_gather_into_tensor(flat, mine)

    def forward(self, **inputs: Any) -> Any:
        return self._model(**inputs)


class _PartitionedTeacher:
    """ZeRO-3: a second engine without optimizer, cut like the first, so that nothing is sent at an update."""

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        settings = engine.zero_settings()
        # A persistent parameter would keep a gathered copy that an update of its partition doesn't reach.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        self._deepspeed = initialize(model, settings)
        self._deepspeed.eval()
        parameters: dict[str, Any] = dict(model.named_parameters())
        partitions = {name: p.ds_tensor for name, p in parameters.items()}
        self._targets, self._sources = [], []
        for i, shard in enumerate(engine.shards):
            for piece in shard.pieces:
                self._targets.append(partitions.pop(piece.name)[: piece.length])
                self._sources.append((i, piece.offset, piece.length))
        frozen = {name: p.ds_tensor for p, name in engine.names.items() if not p.requires_grad}
        for name, source in frozen.items():
            partitions[name].copy_(source)

    def publish(self, averages: Sequence[Tensor]) -> None:
        sources = [averages[i][offset : offset + length] for i, offset, length in self._sources]
        if sources:  # more workers than elements leave some without any
            torch._foreach_copy_(self._targets, sources)

    def forward(self, **inputs: Any) -> Any:
        return self._deepspeed(**inputs)


class MomentumEncoder:
    """The averaged encoder of `engine`'s model; starts equal to it.

    model_factory builds the same architecture again; its weights are overwritten and the random state is left as
    it was. The model is in eval mode and without gradient for good.
    """

    def __init__(self, engine: Engine, model_factory: Callable[[], nn.Module], config: MomentumConfig) -> None:
        self._engine, self._decay = engine, config.decay
        with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
            model = model_factory().requires_grad_(False).eval()
        self._averages = [shard.tensor.clone() for shard in engine.shards]
        with torch.no_grad():
            partitioned = engine.config.zero_stage == 3
            self._teacher: _Teacher = (_PartitionedTeacher if partitioned else _FlatTeacher)(engine, model)
            originals = dict(engine.module.named_buffers())
            self._buffers = [(buffer, originals[name]) for name, buffer in model.named_buffers()]
            self._publish()

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """The model's forward with the averaged weights. Collective at ZeRO-3."""
        return self._teacher.forward(**inputs)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights; call after each `engine.step()`. Collective."""
        masters = [shard.tensor for shard in self._engine.shards]
        torch._foreach_lerp_(self._averages, masters, 1 - self._decay)
        self._publish()

    def _publish(self) -> None:
        self._teacher.publish(self._averages)
        for buffer, original in self._buffers:
            buffer.copy_(original)

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
