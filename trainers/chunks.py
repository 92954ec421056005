"""A worker's texts in chunks, to the model and back in the order of the batch, with what is known of each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_services.ragged import arrays_of
from data_services.schema import SIDES, UNKNOWN, Batch, Ragged
from trainers.encoders.inputs import TowerInputs, lengths_of
from trainers.objectives.keys import Keys


@dataclass(frozen=True)
class Chunk:
    """Items encoded together.

    inputs  what their tower reads of them
    rows    [n] the items' places among the batch's queries and documents

    A chunk without items still runs through the model, as one token that nothing reads and empty arrays: every worker
    must make the same number of calls, or the others wait for it in a collective.
    """

    inputs: TowerInputs
    rows: Tensor

    def gradient(self, of_batch: Tensor, like: Tensor) -> Tensor:
        """[n, D] of [b+d, D], or [n, L, D] of [b+d, L or more, D], as the chunk's output `like`; zeros where the
        chunk has no texts."""
        if not len(self.rows):
            return torch.zeros_like(like, dtype=of_batch.dtype)
        taken = of_batch[self.rows]
        return taken if taken.ndim == 2 else taken[:, : like.shape[1]]


def chunks_of(batch: Batch, device: torch.device, sides: tuple[str, ...] = ("queries", "documents")) -> list[Chunk]:
    """The batch's chunks, of the items of these sides alone; equally many on every worker. Of several towers' chunks,
    those that hold none of them on any worker are left out."""
    items, b = Ragged.concat([batch.queries, batch.documents]), len(batch.queries)
    wanted = np.arange(len(items)) < b if sides == ("queries",) else np.arange(len(items)) >= b
    if len(sides) == 2:
        wanted[:] = True
    chunks = []
    bits = sum(SIDES[side] for side in sides)
    for i, rows in enumerate(batch.chunks):
        if batch.chunk_sides is not None and not batch.chunk_sides[i] & bits:
            continue
        of_side = rows[wanted[rows]]
        prompts, queries = batch.prompt_tokens[of_side], of_side < b
        tower = None if batch.chunk_towers is None else int(batch.chunk_towers[i])
        chunks.append(chunk_of(items.take(of_side), prompts, queries, device, of_side, tower))
    return chunks


def chunk_of(
    items: Ragged,
    prompt_tokens: np.ndarray,
    queries: np.ndarray,
    device: torch.device,
    rows: np.ndarray | None = None,
    tower: int | None = None,
) -> Chunk:
    """n items to encode together, see `Chunk`; rows: none: they are the whole batch."""
    rows = np.arange(len(items)) if rows is None else rows
    tokens = items
    if not len(items):
        tokens, prompt_tokens, queries = Ragged.of([[0]]), np.zeros(1, np.int64), np.zeros(1, bool)

    def there(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    arrays = {}
    for name, array in arrays_of(items).items():
        arrays[name] = there(array.values)
        arrays[lengths_of(name)] = there(array.lengths if len(items) else np.zeros(1, np.int64))
    ids, mask = tokens.padded()
    inputs = TowerInputs(there(ids), there(mask), there(prompt_tokens), there(queries), arrays, tower)
    return Chunk(inputs, there(rows))


def rows_by_tower(batch: Batch) -> dict[int | None, np.ndarray]:
    """By tower, the places of its items among the batch's queries and documents."""
    rows: dict[int | None, list[np.ndarray]] = {}
    towers = [None] * len(batch.chunks) if batch.chunk_towers is None else batch.chunk_towers.tolist()
    for chunk, tower in zip(batch.chunks, towers, strict=True):
        rows.setdefault(tower, []).append(chunk)
    return {tower: np.concatenate(chunks) for tower, chunks in rows.items()}


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
