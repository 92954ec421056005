"""The vectors of a suite's texts: each distinct text is encoded once, whatever tasks and variants ask for it.

Legend: n texts, D dimensions of the model, d of a variant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import numpy as np
from pydantic import Field, model_validator

from data_services.embedding.quantise import quantise, ranges_of, restore
from data_services.items import Item, item_id
from data_services.schema import Encoder, RunError, Section, UsageError
from evaluation.search import rank, rank_tokens, refuse_nan

Side = Literal["query", "document"]
WithPrompts = Callable[[Mapping[Side, str]], Encoder]
"""The model with other prompts, by field."""


class Variant(Section):
    """`variants:` the model used otherwise; each is a column beside the model as it is.

    int8 cuts the range that a dimension has over the task's stored vectors into 256 cells (the middle of a cell stands
    for it); binary keeps signs. Queries of retrieval and reranking stay as they are, all other texts are stored. A
    binary search is by Hamming distance; its first `rescore`·k documents are ordered again by the query's float vector
    with their signs (Shakir, Aarsen & Lee 2024, "Binary and scalar embedding quantization").
    """

    dim: int | None = Field(None, ge=1, description="first dimensions that are kept, of a Matryoshka model")
    quantise: Literal["int8", "binary"] | None = Field(None, description="how vectors are stored; none: float32")
    rescore: int = Field(4, ge=1, description="binary: so many times k candidates are scored again; 1: none are")
    prompts: dict[Side, str] | None = Field(None, description="in place of the model's own")

    @model_validator(mode="after")
    def _differs(self) -> Variant:
        if "rescore" in self.model_fields_set and self.quantise != "binary":
            raise ValueError("rescore belongs to quantise: binary")
        if self.dim is None and self.quantise is None and self.prompts is None:
            raise ValueError("a variant has dim, quantise or prompts; this one is the model as it is")
        return self

    @property
    def name(self) -> str:
        """`dim 128 int8`, `binary rescore 4`, `prompts query='find: '`."""
        parts = [f"dim {self.dim}"] if self.dim else []
        parts += [self.quantise] if self.quantise else []
        parts += [f"rescore {self.rescore}"] if self.quantise == "binary" else []
        parts += [f"prompts {', '.join(f'{f}={p!r}' for f, p in self.prompts.items())}"] if self.prompts else []
        return " ".join(parts)


class Vectors:
    """A model's vectors of texts, kept in memory.

    unit    whether the model's similarity is the cosine; else the inner product of what it gives
    tokens  whether it has a vector for each token of a text instead
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.unit: bool = getattr(encoder, "unit_vectors", True)
        self.tokens: bool = getattr(encoder, "gives_tokens", False)
        self._rows: dict[str, dict[str | int, int]] = {}
        self._kept: dict[str, np.ndarray] = {}

    def of(self, texts: Sequence[Item], side: Side) -> np.ndarray:
        """[n, D] float32, of length 1 where `unit`. RunError for NaN, or another length or number than it should."""
        if self.tokens:
            raise UsageError("this model has a vector for each token of a text: it can be scored by retrieval alone")
        rows = self._rows.setdefault(side, {})
        keys = [text if isinstance(text, str) else item_id(text) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in rows}
        if new:
            vectors = encode(self._encoder, list(new.values()), side)
            rows |= {key: len(rows) + i for i, key in enumerate(new)}
            earlier = [self._kept[side]] if side in self._kept else []
            self._kept[side] = np.concatenate([*earlier, vectors]) if earlier else vectors
        order = [rows[key] for key in keys]
        return self._kept[side] if order == list(range(len(rows))) else self._kept[side][order]

    def stored(self, texts: Sequence[Item], side: Side) -> np.ndarray:
        """As `of`, of texts that an index holds."""
        return self.of(texts, side)

    def nearest(self, queries: Sequence[Item], documents: Sequence[Item], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar documents of each query: positions [q, k] and scores, as of `search.rank`."""
        if self.tokens:
            return rank_tokens(self._tokens_of(queries, "query"), self._tokens_of(documents, "document"), k)
        return rank(self.of(queries, "query"), self.stored(documents, "document"), k)

    def ordered(
        self, queries: Sequence[Item], documents: Sequence[Item], candidates: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Each query's candidates (positions among the documents), most similar first, equal ones as they stand."""
        if self.tokens:
            of_queries, of_documents = self._tokens_of(queries, "query"), self._tokens_of(documents, "document")
            found = [
                rank_tokens([tokens], [of_documents[d] for d in some], len(some))[0][0]
                for tokens, some in zip(of_queries, candidates, strict=True)
            ]
        else:
            vectors, stored = self.of(queries, "query"), self.stored(documents, "document")
            found = [rank(vectors[i : i + 1], stored[list(some)], len(some))[0][0] for i, some in enumerate(candidates)]
        return [np.array(some)[order] for some, order in zip(candidates, found, strict=True)]

    def _tokens_of(self, texts: Sequence[Item], side: Side) -> list[np.ndarray]:
        """The token vectors [m, D] of each text."""
        return self._encoder.encode_tokens(texts, side)  # type: ignore[attr-defined]


class Remembered:
    """An encoder that encodes each item of a field once, however often it is asked; see `Encoder`."""

    def __init__(self, encoder: Encoder) -> None:
        self.vectors = Vectors(encoder)
        self.unit_vectors, self.gives_tokens = self.vectors.unit, self.vectors.tokens
        self._encoder = encoder

    def encode(self, texts: Sequence[Item], field: str) -> np.ndarray:
        return self.vectors.of(texts, cast(Side, field))

    def encode_tokens(self, texts: Sequence[Item], field: str) -> list[np.ndarray]:
        """Of a model that has a vector for each token; these are too many to keep."""
        return self._encoder.encode_tokens(texts, field)  # type: ignore[attr-defined]


class VariantVectors(Vectors):
    """Another model's vectors as a variant has them, from the same encoded texts."""

    def __init__(self, of_model: Vectors, variant: Variant) -> None:
        self._model, self._variant = of_model, variant
        self.unit, self.tokens = of_model.unit, of_model.tokens
        if self.tokens:
            raise UsageError(f"variant {variant.name!r} needs one vector a text, this model has one for each token")

    def of(self, texts: Sequence[Item], side: Side) -> np.ndarray:
        """[n, d] float32."""
        vectors, dim = self._model.of(texts, side), self._variant.dim
        if dim is None:
            return vectors
        if dim > vectors.shape[1]:
            raise UsageError(f"variant {self._variant.name!r}: the model has {vectors.shape[1]} dimensions")
        return unit_length(vectors[:, :dim]) if self.unit else vectors[:, :dim]

    def stored(self, texts: Sequence[Item], side: Side) -> np.ndarray:
        vectors, dtype = self.of(texts, side), self._variant.quantise
        if dtype is None:
            return vectors
        ranges = ranges_of(vectors) if dtype == "int8" else None
        return restore(quantise(vectors, dtype, ranges), dtype, vectors.shape[1], ranges)

    def nearest(self, queries: Sequence[Item], documents: Sequence[Item], k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._variant.quantise != "binary":
            return super().nearest(queries, documents, k)
        vectors, stored = self.of(queries, "query"), _signs(self.of(documents, "document"))
        found, scores = rank(_signs(vectors), stored, k * self._variant.rescore)
        if self._variant.rescore == 1:
            return found, scores
        exact = np.einsum("qd,qkd->qk", vectors.astype(np.float64), stored[found]).astype(np.float32)
        exact[found < 0] = -np.inf
        order = np.lexsort((found, -exact), axis=1)[:, :k]
        return np.take_along_axis(found, order, 1), np.take_along_axis(exact, order, 1)


def variant_vectors(of_model: Vectors, variant: Variant, with_prompts: WithPrompts) -> Vectors:
    """The vectors of a model used as a variant says; those of `of_model` where it has no prompts of its own."""
    base = of_model if variant.prompts is None else Vectors(with_prompts(variant.prompts))
    return base if variant.dim is None and variant.quantise is None else VariantVectors(base, variant)


def _signs(vectors: np.ndarray) -> np.ndarray:
    """1 and -1, whose inner products are whole numbers and tie where the Hamming distances do."""
    return np.where(vectors > 0, np.float32(1), np.float32(-1))


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """[n, D] brought to length 1; a zero vector stays one."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length == 0, 1, length)


def encode(encoder: Encoder, texts: Sequence[Item], side: str) -> np.ndarray:
    """The texts' vectors [n, D], checked. RunError for NaN, or another number of rows or length than promised."""
    vectors = np.asarray(encoder.encode(texts, side))
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise RunError(f"the encoder gave {vectors.shape} for {len(texts)} {side} texts: give one row for each")
    refuse_nan(vectors, side)
    if not getattr(encoder, "unit_vectors", True):
        return vectors
    length = np.linalg.norm(vectors.astype(np.float64), axis=1)
    off = np.abs(length - 1) > 1e-2  # bf16 vectors are within 4e-3
    if off.any():
        row = int(np.argmax(off))
        raise RunError(f"the encoder's {side} vector {row} has length {length[row]:.3g}: normalise to unit length")
    return vectors
