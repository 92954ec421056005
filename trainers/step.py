"""One optimizer step over a global batch: encode in chunks, loss over embeddings, gradients back through the chunks.

Two ways to the same gradient. Direct: every chunk's graph is kept until the loss is known.
Cached (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup"): chunks are
encoded without a graph, the loss gives each embedding its gradient, and each chunk is encoded again with its graph
to carry that gradient to the weights. Dropout is keyed by (seed, step, worker, chunk), so the second encoding draws
the masks of the first and nothing random has to be saved.

See `data_services/schema.py` for the shape legend.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_services.schema import Batch
from trainers.chunks import Chunk, chunks_of, in_batch_order, keys_of, rows_by_tower
from trainers.collectives import Group
from trainers.encoders.inputs import TowerInputs
from trainers.faults import rows_not_finite
from trainers.objectives.embedded import Counts, Embedded, Objective
from trainers.objectives.keys import Keys
from trainers.objectives.masked_lm import HeadLoss, share_of_head
from trainers.objectives.sections.numbers import Number, value_at
from trainers.pace import Stopwatch

if TYPE_CHECKING:
    from trainers.ema import MomentumEncoder
    from trainers.engine import Engine
    from trainers.negative_queue import Queues, Side


@dataclass(frozen=True)
class Memory:
    """The momentum encoder and the queues it fills; without queues its weights are wanted, or its vectors."""

    encoder: MomentumEncoder
    queues: Queues | None


Fresh = dict["Side", tuple[Tensor, Keys]]
Outputs = tuple[Tensor, Tensor, Tensor]
"""Of a chunk, see `Trained.forward`."""


class ContrastiveStep:
    """Callable on each `Batch` in turn, on every worker at once; returns the step's metrics (global values).

    cached      whether to encode twice instead of keeping graphs; decided once a run, see `choose_caching`
    agreement   a number that must be the same on all workers: the hash of what they were configured with
    head_weight of the auxiliary head's loss, where the model has one
    compares    the sides whose momentum encodings the objective compares

    A step whose loss or gradient isn't finite, on any worker, is skipped by all: metric `skipped` is 1, and weights,
    optimizer, average and queue are as before. It takes its usual way, so that every worker makes the same calls.

    encoding    time of this worker's own work in the last step, up to where it needs the others (ZeRO-3: not quite)
    suspects    [n] of this worker's `rows` of a skipped batch, those whose own vectors or weights aren't finite
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        memory: Memory | None,
        *,
        cached: bool,
        seed: int,
        group: Group,
        agreement: int = 0,
        head_weight: Number = 0.0,
        compares: frozenset[str] = frozenset(),
    ) -> None:
        self.engine, self.objective, self.memory = engine, objective, memory
        self.cached, self.seed, self.group, self.agreement = cached, seed, group, agreement
        self.head_weight, self.compares = head_weight, compares
        self.encoding = Stopwatch(engine.device)
        self.suspects = np.zeros(0, np.int64)

    def __call__(self, batch: Batch) -> dict[str, float]:
        counts = self._agreed(batch)
        chunks = chunks_of(batch, self.engine.device)
        keys = keys_of(batch, self._lengths(batch, chunks), self.engine.device)
        self.encoding.start()
        fresh = self._momentum(batch, keys)
        self.engine.train()
        with torch.set_grad_enabled(not self.cached):
            encoded = [self._encode(batch.step, i, chunk) for i, chunk in enumerate(chunks)]
        self.encoding.stop()

        texts = len(batch.queries) + len(batch.documents)
        embeddings = in_batch_order([output[0] for output in encoded], chunks, texts).requires_grad_()
        learned = encoded[0][1].detach().clone().requires_grad_()
        embedded = self.embedded(batch, embeddings, learned, keys, fresh, counts)
        metrics = self._loss_backward(embedded, fresh, (embeddings, learned))
        of_head = self._head_share(batch.step, encoded, metrics)
        self._chunks_backward(batch.step, chunks, encoded, (embeddings, learned, of_head))
        info = self.engine.step()
        if info.taken:
            self._remember(batch.step, fresh, counts)
        else:
            self.suspects = rows_not_finite(batch, embeddings.detach())
        return metrics | {"grad_norm": info.grad_norm, "lr": info.lr, "skipped": float(not info.taken)}

    @property
    def packed(self) -> bool:
        """Whether no padding is computed."""
        return self.engine.module.tower.packed

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of this worker's items, see `Tower.flops_per_token`."""
        lengths = np.concatenate([batch.queries.lengths, batch.documents.lengths])
        tower, total = self.engine.module.tower, 0.0
        for number, rows in rows_by_tower(batch).items():
            its = lengths[rows]
            total += float(its.sum() * tower.of(number).flops_per_token(its.mean())) if len(its) else 0.0
        return total

    def _encode(self, step: int, index: int, chunk: Chunk) -> Outputs:
        torch.manual_seed(key(self.seed, step, self.group.rank, index))
        return self.engine.forward(inputs=chunk.inputs)

    def _loss_backward(self, embedded: Embedded, fresh: Fresh, leaves: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Fills the gradients of the embeddings [b+d, D] and the learned scalars [k] with that of the whole batch's
        loss; with NaN where a loss isn't finite, which reaches every worker with the gradients."""
        share = self.objective(embedded)
        share.loss.backward()
        metrics = {name: float(value) for name, value in share.metrics.items()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(float(share.loss.detach()))):
            for leaf in leaves:
                leaf.grad = torch.full_like(leaf, math.nan)
        queues = self.memory.queues if self.memory else None
        return metrics | (queues.observe(fresh, embedded.step) if queues else {})

    def embedded(
        self,
        batch: Batch,
        embeddings: Tensor,
        learned: Tensor,
        keys: tuple[Keys, Keys],
        fresh: Fresh,
        counts: Counts | None = None,
    ) -> Embedded:
        """What the objective sees of a batch: embeddings [b+d, D] or [b+d, L, D], learned [k], the keys of queries and
        documents, what the momentum encoder made of them, and the queues' rows; counts as in `Embedded`."""
        device, step = embeddings.device, batch.step
        queries, documents = embeddings.split([len(batch.queries), len(batch.documents)])
        if keys[0].lengths is not None:  # token vectors: what travels is as long as the longest query
            queries = queries[:, : max([1, *keys[0].lengths.tolist()])]
        queues = self.memory.queues if self.memory else None

        def there(column: np.ndarray | None) -> Tensor | None:
            return None if column is None else torch.as_tensor(column, device=device)

        return Embedded(
            queries=queries,
            documents=documents,
            query_keys=keys[0],
            document_keys=keys[1],
            owners=torch.as_tensor(batch.owners, device=device),
            global_queries=batch.global_queries,
            step=step,
            progress=step / self.engine.total_steps,
            weights=there(batch.weights),
            scores=there(batch.scores),
            momentum_queries=fresh["queries"][0] if "queries" in fresh else None,
            momentum_documents=fresh["documents"][0] if "documents" in fresh else None,
            teacher_queries=there(batch.teacher_queries),
            teacher_documents=there(batch.teacher_documents),
            queues=queues.rows(step) if queues else {},
            learned=dict(zip(self.engine.module.learned_names, learned, strict=True)),
            counts=counts,
            operands=self.engine.compute_dtype,
        )

    def _head_share(self, step: int, encoded: Sequence[Outputs], metrics: dict[str, float]) -> Tensor:
        """[2] or [0] dL/d(what the auxiliary head gives of each chunk); adds its metrics, and its part of the loss."""
        if self.engine.module.head is None:
            return torch.zeros(0, device=self.engine.device)
        weight = value_at(self.head_weight, step / self.engine.total_steps)
        of_chunks = [HeadLoss(*output[2].detach()) for output in encoded]
        share = share_of_head(of_chunks, weight, self.group)
        metrics |= share.metrics | {"loss": metrics["loss"] + weight * share.metrics["masked_lm"]}
        return torch.tensor([share.gradient, 0.0], device=self.engine.device)

    def _chunks_backward(
        self, step: int, chunks: list[Chunk], encoded: list[Outputs], seen: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """One backward a chunk, kept graph or not: autograd would add up a bf16 gradient's chunks in bf16.

        seen  embeddings and learned scalars with their gradients, and the gradient of what the head gives. That of
              the scalars enters the graph once, with the first chunk.
        """
        embeddings, learned, of_head = seen
        of_batch = _gradient(embeddings)
        for i, chunk in enumerate(chunks):
            outputs = self._encode(step, i, chunk) if self.cached else encoded[i]
            of_scalars = _gradient(learned) if i == 0 else torch.zeros_like(learned)
            gradients = [chunk.gradient(of_batch, outputs[0]), of_scalars, of_head]
            self.engine.backward(outputs, gradients, last=i == len(chunks) - 1)

    def _momentum(self, batch: Batch, keys: tuple[Keys, Keys]) -> Fresh:
        """The momentum encoder's vectors of the sides that the queues keep or the objective compares, with keys."""
        if not self.memory:
            return {}
        sides = set(self.compares) | (self.memory.queues.sides if self.memory.queues else set())
        if not sides:
            return {}
        chunks = chunks_of(batch, self.engine.device, tuple(sorted(sides, reverse=True)))
        encoded = []
        for i, chunk in enumerate(chunks):
            torch.manual_seed(key(self.seed, batch.step, self.group.rank, i, "momentum"))
            encoded.append(self.memory.encoder.forward(inputs=chunk.inputs)[0])
        b, d = len(batch.queries), len(batch.documents)
        queries, documents = in_batch_order(encoded, chunks, b + d).split([b, d])
        found: Fresh = {"queries": (queries, keys[0]), "documents": (documents, keys[1])}
        return {side: found[side] for side in found if side in sides}

    def _remember(self, step: int, fresh: Fresh, counts: Counts) -> None:
        """Moves the average towards the new weights and enqueues what it encoded of the batch."""
        if not self.memory:
            return
        self.memory.encoder.update()
        if self.memory.queues is not None:
            queries, documents = (list(of_workers) for of_workers in zip(*counts, strict=True))
            self.memory.queues.enqueue(fresh, step, {"queries": queries, "documents": documents})

    def _lengths(self, batch: Batch, chunks: Sequence[Chunk]) -> Tensor | None:
        """[b+d] valid tokens of every text's token vectors; None of a model that pools them."""
        tower = self.engine.module.tower
        if not tower.gives_tokens:
            return None
        lengths = torch.zeros(len(batch.queries) + len(batch.documents), dtype=torch.int64, device=self.engine.device)
        for chunk in chunks:
            if len(chunk.rows):
                lengths[chunk.rows] = tower.token_counts(chunk.inputs)
        return lengths

    def _agreed(self, batch: Batch) -> Counts:
        """(b, d) of every worker, in rank order. Raises ValueError, on every worker, where one has another
        configuration or another number of chunks: the others would wait for it in a collective until that timed out.
        Collective."""
        counts = len(batch.queries), len(batch.documents)
        own = torch.tensor([[self.agreement, len(batch.chunks), *counts]], device=self.engine.device)
        everyone = self.group.all_gather(own, [1] * self.group.size)
        for column, what in enumerate(("the hash of the configuration", "chunks of batch")):
            values = everyone[:, column].tolist()
            if len(set(values)) > 1:
                told = f"{what} {batch.step}" if column else what
                raise ValueError(f"the workers disagree about {told}: {values}, in rank order")
        return tuple((b, d) for _, _, b, d in everyone.tolist())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def key(*numbers: int | str) -> int:
    """A 63-bit random seed that is a pure function of `numbers`."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def choose_caching(engine: Engine, choice: str, texts: float, length: int, allowed_bytes: int) -> bool:
    """Whether to cache: on "auto", where the graphs of `texts` texts of `length` tokens pass `allowed_bytes`.

    A pure function of the recipe and the model, never of free memory: the same on every worker and machine.
    Collective.
    """
    if choice != "auto":
        return choice == "on"
    return texts * graph_bytes(engine, length) > allowed_bytes


def graph_bytes(engine: Engine, length: int) -> float:
    """Bytes that the graph of one text of `length` tokens keeps for its backward, weights aside; measured on two. Of
    several towers the most that an item of one keeps."""
    engine.train()
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, length, dtype=torch.int64, device=engine.device)
    most, tower = 0.0, engine.module.tower
    for number in tower.numbers:
        kept.clear()
        inputs = TowerInputs(ids, torch.ones_like(ids), ids[:, 0], ids[:, 0] == 0, tower=number)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            vectors, *_ = engine.forward(inputs=inputs)
        most = max(most, sum(kept.values()) / len(vectors))
    return most
