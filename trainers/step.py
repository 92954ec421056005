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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_services.schema import Batch, Ragged
from trainers.negative_queue import NO_QUERY
from trainers.objectives.contrastive import Contrastive, Ids

if TYPE_CHECKING:
    from trainers.ema import MomentumEncoder
    from trainers.engine import Engine
    from trainers.negative_queue import NegativeQueue


@dataclass(frozen=True)
class Memory:
    """The momentum encoder and the queue it fills; without a queue only its weights are wanted, for export."""

    encoder: MomentumEncoder
    queue: NegativeQueue | None


class ContrastiveStep:
    """Callable on each `Batch` in turn, on every worker at once; returns the step's metrics (global values).

    cached         whether to encode twice instead of keeping graphs; decided once a run, see `choose_caching`
    prompt_tokens  leading tokens that are the prompt, of a query and of a document
    """

    def __init__(
        self,
        engine: Engine,
        objective: Contrastive,
        memory: Memory | None,
        *,
        cached: bool,
        seed: int,
        rank: int,
        prompt_tokens: tuple[int, int] = (0, 0),
    ) -> None:
        self.engine, self.objective, self.memory = engine, objective, memory
        self.cached, self.seed, self.rank = cached, seed, rank
        self.prompt_tokens = prompt_tokens

    def __call__(self, batch: Batch) -> dict[str, float]:
        chunks = self._chunks(batch)
        self.engine.train()
        with torch.set_grad_enabled(not self.cached):
            encoded = [self._encode(batch.step, i, chunk) for i, chunk in enumerate(chunks)]

        embeddings = in_batch_order(encoded, chunks).detach().requires_grad_()
        metrics = self._loss_backward(batch, embeddings)
        assert embeddings.grad is not None
        gradients = [chunk.gradient(embeddings.grad) for chunk in chunks]

        # One backward a chunk, kept graph or not: autograd would add up a bf16 gradient's chunks in bf16.
        for i, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True)):
            output = self._encode(batch.step, i, chunk) if self.cached else encoded[i]
            self.engine.backward([output], [gradient], last=i == len(chunks) - 1)

        info = self.engine.step()
        self._remember(batch)
        return metrics | {"grad_norm": info.grad_norm, "lr": info.lr}

    def _chunks(self, batch: Batch, first: int = 0) -> list[Chunk]:
        """The batch's chunks, without the texts before `first`."""
        texts = Ragged.concat([batch.queries, batch.documents])
        prompts = np.repeat(self.prompt_tokens, [len(batch.queries), len(batch.documents)])
        return [Chunk.of(texts, prompts, rows[rows >= first], self.engine.device) for rows in batch.chunks]

    def _encode(self, step: int, index: int, chunk: Chunk) -> Tensor:
        torch.manual_seed(key(self.seed, step, self.rank, index))
        return self.engine.forward(**chunk.inputs)

    def _loss_backward(self, batch: Batch, embeddings: Tensor) -> dict[str, float]:
        """Fills embeddings.grad [b+d, D] with the gradient of the whole batch's loss."""
        queries, documents = embeddings.split([len(batch.queries), len(batch.documents)])
        ids = Ids(*(torch.from_numpy(x).to(embeddings.device) for x in (batch.query_ids, batch.document_ids)))
        queue = self.memory.queue if self.memory else None
        rows = queue.rows() if queue is not None else None
        share = self.objective(queries, documents, ids, batch.global_queries, rows)
        share.loss.backward()
        metrics = {name: float(value) for name, value in share.metrics.items()}
        if queue is not None:
            metrics["queue_age_steps"] = queue.age_steps(batch.step)
        return metrics

    def _remember(self, batch: Batch) -> None:
        """Moves the average towards the new weights and enqueues its encodings of the batch's documents."""
        if not self.memory:
            return
        self.memory.encoder.update()
        if self.memory.queue is None:
            return
        first = len(batch.queries)
        chunks = self._chunks(batch, first)
        encoded = [self.memory.encoder.forward(**chunk.inputs) for chunk in chunks]
        answers = np.full(len(batch.documents), NO_QUERY)  # a hard negative answers no query
        answers[:first] = batch.query_ids
        self.memory.queue.enqueue(
            in_batch_order(encoded, chunks)[first:],
            torch.from_numpy(batch.document_ids),
            torch.from_numpy(answers),
            batch.step,
        )


@dataclass(frozen=True)
class Chunk:
    """Texts encoded together.

    ids, mask      [n, L] int64
    prompt_tokens  [n] int64
    rows           [n] the texts' places among the batch's queries and documents
    texts          number of those

    A chunk without texts still runs through the model, as one token that nothing reads: every worker must make the
    same number of calls, or the others wait for it in a collective.
    """

    ids: Tensor
    mask: Tensor
    prompt_tokens: Tensor
    rows: Tensor
    texts: int

    @classmethod
    def of(cls, texts: Ragged, prompts: np.ndarray, rows: np.ndarray, device: torch.device) -> Chunk:
        ids, mask = texts.take(rows).padded() if len(rows) else Ragged.of([[0]]).padded()
        prompt_tokens = prompts[rows] if len(rows) else np.zeros(1, np.int64)

        def there(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(there(ids), there(mask), there(prompt_tokens), there(rows), len(texts))

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "prompt_tokens": self.prompt_tokens}

    def gradient(self, of_batch: Tensor) -> Tensor:
        """[n, D] of [b+d, D]; one row of zeros where the chunk has no texts."""
        return of_batch[self.rows] if len(self.rows) else of_batch.new_zeros(1, of_batch.shape[1])


def in_batch_order(encoded: list[Tensor], chunks: list[Chunk]) -> Tensor:
    """[b+d, D] float32: the chunks' embeddings back at their texts' places; zeros where no chunk holds the text."""
    out = encoded[0].new_zeros(chunks[0].texts, encoded[0].shape[1], dtype=torch.float32)
    for vectors, chunk in zip(encoded, chunks, strict=True):
        out[chunk.rows] = vectors.detach()[: len(chunk.rows)].float()
    return out


def key(*numbers: int) -> int:
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
    """Bytes that the graph of one text of `length` tokens keeps for its backward, weights aside; measured on two."""
    engine.train()
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, length, dtype=torch.int64, device=engine.device)
    prompt_tokens = torch.zeros(2, dtype=torch.int64, device=engine.device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        engine.forward(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_tokens=prompt_tokens)
    return sum(kept.values()) / 2
