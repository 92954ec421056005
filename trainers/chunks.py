"""A worker's texts in chunks, to the model and back in the order of the batch, with what is known of each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_services.schema import UNKNOWN, Batch, Ragged
from trainers.objectives.keys import Keys


@dataclass(frozen=True)
class Chunk:
    """Texts encoded together.

    ids, mask      [n, L] int64
    prompt_tokens  [n] int64
    queries        [n] bool, which are queries
    rows           [n] the texts' places among the batch's queries and documents

    A chunk without texts still runs through the model, as one token that nothing reads: every worker must make the
    same number of calls, or the others wait for it in a collective.
    """

    ids: Tensor
    mask: Tensor
    prompt_tokens: Tensor
    queries: Tensor
    rows: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "prompt_tokens": self.prompt_tokens,
            "queries": self.queries,
        }

    def gradient(self, of_batch: Tensor, like: Tensor) -> Tensor:
        """[n, D] of [b+d, D], or [n, L, D] of [b+d, L or more, D], as the chunk's output `like`; zeros where the
        chunk has no texts."""
        if not len(self.rows):
            return torch.zeros_like(like, dtype=of_batch.dtype)
        taken = of_batch[self.rows]
        return taken if taken.ndim == 2 else taken[:, : like.shape[1]]


def chunks_of(batch: Batch, device: torch.device, sides: tuple[str, ...] = ("queries", "documents")) -> list[Chunk]:
    """The batch's chunks, of the texts of these sides alone; equally many on every worker. Of two towers' chunks, those
    of the other side are left out."""
    texts, b = Ragged.concat([batch.queries, batch.documents]), len(batch.queries)
    chunks = list(batch.chunks)
    first = len(chunks) if batch.query_chunks is None else batch.query_chunks
    if len(sides) == 1:
        of_queries = sides == ("queries",)
        if batch.query_chunks is not None:
            chunks, first = (chunks[:first], first) if of_queries else (chunks[first:], 0)
        chunks = [rows[(rows < b) == of_queries] for rows in chunks]
    return list(_made(texts, batch.prompt_tokens, b, chunks, first, device))


def _made(
    texts: Ragged, prompts: np.ndarray, b: int, chunks: Sequence[np.ndarray], first: int, device: torch.device
) -> Iterator[Chunk]:
    """Of the first chunks also those without texts count as queries: two towers must take turns alike everywhere."""
    for i, rows in enumerate(chunks):
        ids, mask = texts.take(rows).padded() if len(rows) else Ragged.of([[0]]).padded()
        prompt_tokens = prompts[rows] if len(rows) else np.zeros(1, np.int64)
        queries = rows < b if len(rows) else np.array([i < first])
        arrays = ids, mask, prompt_tokens, queries, rows
        yield Chunk(*(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))


def in_batch_order(encoded: Sequence[Tensor], chunks: Sequence[Chunk], texts: int) -> Tensor:
    """[texts, D], or [texts, L, D] with the longest L, float32: the chunks' outputs back at their texts' places; zeros
    where no chunk holds the text."""
    shape = list(encoded[0].shape)
    if len(shape) == 3:
        shape[1] = max(part.shape[1] for part in encoded)
    out = encoded[0].new_zeros(texts, *shape[1:], dtype=torch.float32)
    for part, chunk in zip(encoded, chunks, strict=True):
        found = part.detach()[: len(chunk.rows)].float()
        if found.ndim == 2:
            out[chunk.rows] = found
        else:
            out[chunk.rows, : found.shape[1]] = found
    return out


def keys_of(batch: Batch, lengths: Tensor | None, device: torch.device) -> tuple[Keys, Keys]:
    """What masks compare, of the queries [b] and of the documents [d]; `lengths` [b+d] of token vectors."""
    b, classes = len(batch.queries), {}
    for name in ("labels", "tasks", "languages", "modalities"):
        column = getattr(batch, name)
        if column is not None:
            # A hard negative is of its query's task, language and modality; of its label nothing is known.
            of_documents = column[batch.owners]
            if name == "labels":
                of_documents = np.where(batch.relations > 0, of_documents, UNKNOWN)
            classes[name] = column, of_documents
    rejects = np.where(batch.relations < 0, batch.query_ids[batch.owners], UNKNOWN)
    queries = {"query_ids": batch.query_ids, "document_ids": batch.document_ids[:b]}
    documents = {"query_ids": batch.answers, "document_ids": batch.document_ids, "rejects": rejects}
    if batch.frequencies is not None:  # a hard negative was chosen, not drawn: it counts as a usual one
        of_documents = np.where(batch.relations > 0, batch.frequencies[batch.owners], 1)
        documents["log_q"] = np.log(of_documents).astype(np.float32)
    queries |= {name: of_queries for name, (of_queries, _) in classes.items()}
    documents |= {name: of_documents for name, (_, of_documents) in classes.items()}
    both = [Keys(**{name: _there(column, device) for name, column in side.items()}) for side in (queries, documents)]
    if lengths is not None:
        both = [replace(keys, lengths=part) for keys, part in zip(both, lengths.tensor_split([b]), strict=True)]
    return both[0], both[1]


def _there(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
