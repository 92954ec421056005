"""The way of a step's gradients from the chunks' backward passes to the workers' shards.

once       chunks add up in whole fp32 gradients on every worker, which are reduced after the last: one reduction a
           step, 4 bytes a trained parameter
per_chunk  each backward pass reduces its gradients a bucket at a time and adds what this worker owns to its fp32
           share: 4 bytes / W a trained parameter and a bucket, and the traffic of a reduction with every chunk
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_services.schema import UsageError
from trainers.config import EngineConfig

# Bytes of an element of a gradient: whatever the model computes in, chunks add up in fp32.
GRADIENT_BYTES = 4


def choose_reduction(config: EngineConfig, elements: int) -> Literal["once", "per_chunk"]:
    """`engine.reduction` of a model with so many trained elements; auto is once where whole gradients fit
    `engine.gradient_bytes`, or where ZeRO doesn't shard gradients (0 and 1), else per_chunk.

    Raises UsageError for per_chunk at ZeRO 0 and 1, where it would save nothing.
    """
    sharded = config.zero_stage >= 2
    if config.reduction == "per_chunk" and not sharded:
        raise UsageError(f"engine.reduction: per_chunk needs engine.zero_stage of 2 or 3; it is {config.zero_stage}")
    if config.reduction != "auto":
        return config.reduction
    return "per_chunk" if sharded and GRADIENT_BYTES * elements > config.gradient_bytes else "once"


class Reduction:
    """Runs the backward passes of a DeepSpeed engine's steps.

    engine   made with `managed_gradient_accumulation: false` for per_chunk
    config   its `reduction` chosen: once or per_chunk
    trained  the model's trainable parameters
    masters  their fp32 weights on this worker, which the optimizer steps
    """

    def __init__(
        self, engine: Any, config: EngineConfig, trained: Sequence[nn.Parameter], masters: Sequence[Tensor]
    ) -> None:
        self._engine, self._stage, self._masters = engine, config.zero_stage, masters
        self._per_chunk = config.reduction == "per_chunk"
        self.open = False
        if self._per_chunk:
            # In fp32, ZeRO-2 would keep the whole gradient of all that its part touches: a table's on several workers.
            engine.optimizer._use_compact_grad_partition_buffer = lambda group: True
            return
        if self._stage == 1:
            # As a setting this selects another optimizer at ZeRO-1, one that reduces in every backward pass.
            engine.optimizer.gradient_accumulation_dtype = torch.float32
        for p in trained:
            p.register_post_accumulate_grad_hook(_accumulate_in_fp32)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds one backward pass to the step's gradients; after `last` every worker's share is its mean over workers.

        Collective: the same number of calls on every worker.
        """
        if not self.open:
            self._forget()
            self.open = True
        if self._per_chunk:
            if self._stage == 3:
                # DeepSpeed counts backward passes by the forwards between them: several after all forwards overwrote
                # each other, and a parameter first reached by a later one kept the step before's.
                self._engine.optimizer.micro_step_id = 1
            self._engine.backward(loss, scale_wrt_gas=False)
        else:
            with self._only_accumulating():
                self._engine.backward(loss, scale_wrt_gas=False)
            if last:
                self._reduce()
        self.open = not last

    def _forget(self) -> None:
        """A parameter that this step doesn't reach would otherwise keep the gradient of the step before."""
        if self._stage == 3:
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        for master in self._masters if self._stage else ():
            if master.grad is not None:  # only with offload
                master.grad.zero_()

    @contextmanager
    def _only_accumulating(self) -> Iterator[None]:
        """A backward pass inside leaves whole gradients on the parameters.

        From ZeRO-1 on these are the switches of `coalesce_grad_reduction`. Held open from the first chunk to the
        last, that would reduce on its way out of a worker that has failed in between.
        """
        if not self._stage:
            with self._engine.no_sync():
                yield
            return
        self._engine.inside_no_sync_ctxt = self._engine.optimizer._coalesce_grad_reduction = True
        try:
            yield
        finally:
            self._engine.inside_no_sync_ctxt = self._engine.optimizer._coalesce_grad_reduction = False

    def _reduce(self) -> None:
        """Averages over the workers what the parameters hold."""
        if self._stage:
            with self._engine.coalesce_grad_reduction():
                pass  # it reduces on leaving
        else:
            self._engine.allreduce_gradients()


def _accumulate_in_fp32(parameter: Tensor) -> None:
    """Widens a bf16 gradient once: autograd adds later chunks into it in place, hence in fp32."""
    if parameter.grad is not None and parameter.grad.dtype != torch.float32:
        parameter.grad.data = parameter.grad.data.float()
