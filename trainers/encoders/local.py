"""A trained tower, or several, as an `Encoder` of this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_services.ragged import towers_of
from data_services.schema import Item, Ragged, Tokenize
from trainers.chunks import chunk_of
from trainers.encoders.tower import Tower
from trainers.encoders.towers import Towers


class LocalEncoder:
    """`Encoder` on its model's device: batches of similar length, `batch_tokens` padded tokens each.

    tokenize      what made the model's inputs in training; it says which of several towers encodes an item
    batch_tokens  None: 16,384, and 1,024 on a CPU, where a layer's activations should stay in the cache

    A field is "query" or "document", or one of a task that has its own prompt ("sts-query").
    """

    def __init__(self, encoder: Tower | Towers, tokenize: Tokenize, batch_tokens: int | None = None) -> None:
        on_cpu = next(encoder.parameters()).device.type == "cpu"
        self.encoder, self.tokenize = encoder, tokenize
        self.batch_tokens = batch_tokens or (1024 if on_cpu else 16384)
        self.gives_tokens, self.unit_vectors = encoder.gives_tokens, encoder.spec.normalize

    def encode(self, texts: Sequence[Item], field: str) -> np.ndarray:
        """Vectors [n, D] float32 of items of one field, in their order; of length one unless the model says not."""
        if self.gives_tokens:
            raise ValueError("this model has a vector for each token of a text; call encode_tokens")
        vectors = np.zeros((len(texts), self.encoder.dim), np.float32)
        for rows, embedded, _ in self._embedded(texts, field):
            vectors[rows] = embedded
        return vectors

    def encode_tokens(self, texts: Sequence[Item], field: str) -> list[np.ndarray]:
        """The token vectors [m, D] float32 of each item, of a model with pooling "tokens"."""
        if not self.gives_tokens:
            raise ValueError("this model has one vector a text; call encode")
        vectors: list[np.ndarray] = [np.zeros((0, self.encoder.dim), np.float32)] * len(texts)
        for rows, embedded, counts in self._embedded(texts, field):
            for row, tokens, count in zip(rows, embedded, counts, strict=True):
                vectors[row] = tokens[:count]
        return vectors

    def _embedded(self, texts: Sequence[Item], field: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each batch the rows of its items [n], what `embed` gives, and the numbers of pooled tokens [n]."""
        items, prompt = self.tokenize(texts, field), self.tokenize.prompt_tokens(field)
        device = next(self.encoder.parameters()).device
        training, batches = self.encoder.training, []
        self.encoder.eval()
        try:
            with torch.inference_mode():
                for tower, rows in self._batches(items):
                    prompts, queries = np.full(len(rows), prompt), np.full(len(rows), field.endswith("query"))
                    inputs = chunk_of(items.take(rows), prompts, queries, device, rows, tower).inputs
                    counts = self.encoder.token_counts(inputs)
                    batches.append((rows, self.encoder.embed(inputs).cpu().numpy(), counts.cpu().numpy()))
        finally:
            self.encoder.train(training)
        return batches

    def _batches(self, items: Ragged) -> Iterator[tuple[int | None, np.ndarray]]:
        """(the tower that encodes them, rows of items of similar length); the longest first."""
        lengths, towers = items.lengths, towers_of(items)
        for tower in [None] if towers is None else np.unique(towers).tolist():
            its = np.arange(len(items)) if towers is None else np.flatnonzero(towers == tower)
            order = its[np.argsort(-lengths[its], kind="stable")]
            start = 0
            while start < len(order):
                count = max(1, self.batch_tokens // max(1, int(lengths[order[start]])))
                yield tower, order[start : start + count]
                start += count
