"""The model that is served: loaded, asked for many requests at once, exchanged where its alias moves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.embedding import load_encoder
from cluster.models.reference import resolve
from cluster.serving.protocol import FIELDS
from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    from data_services.tokenizer import FolderTokenizer
    from trainers.encoders.local import LocalEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """Texts of one request, and whether they are queries or documents."""

    texts: tuple[str, ...]
    field: str


@dataclass(frozen=True)
class Done:
    """What became of a `Work`: vectors [n, D] float32 and the tokens of its texts; or why not, in one sentence."""

    model: str
    vectors: np.ndarray
    tokens: int
    refused: str = ""


@dataclass(frozen=True)
class _Loaded:
    name: str
    folder: Path
    encoder: LocalEncoder

    @property
    def dimensions(self) -> int:
        return self.encoder.encoder.dim

    def tokenizer(self, field: str) -> FolderTokenizer:
        """What reads the texts of this field."""
        from data_services.inputs import Routed
        from data_services.vision_text import VisionText

        reader: Any = self.encoder.tokenize
        if isinstance(reader, Routed):
            reader = reader.readers[field if reader.by == "field" else "text"]
        return reader.text if isinstance(reader, VisionText) else reader


class ServedModel:
    """MODEL with its encoder; where it is `models:/NAME@ALIAS`, the version that the alias means, whenever it moves.

    The new version is loaded beside the old one, which answers until then, and after: a request is encoded by one
    version from its first text to its last. A version that can't be loaded leaves the old one in place and `trouble`
    set.
    """

    def __init__(self, model: str, root: Path | None = None, follow_s: float = 5.0) -> None:
        self._model, self._root = model, root
        self._now = self._load()
        self.trouble = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if model.startswith("models:/") and "@" in model and follow_s > 0:
            self._thread = threading.Thread(target=self._follow, args=(follow_s,), name="follow", daemon=True)
            self._thread.start()

    def about(self) -> dict[str, Any]:
        """model, dimensions, max_tokens, trouble: what keeps it from following its alias, "" as usual."""
        now = self._now
        limit = now.tokenizer("query").max_tokens
        return {"model": now.name, "dimensions": now.dimensions, "max_tokens": limit, "trouble": self.trouble}

    def encode(self, works: Sequence[Work]) -> list[Done]:
        """All of them together, so that texts of similar length share a batch whoever asked for them."""
        now = self._now
        done: dict[int, Done] = {}
        for field in FIELDS:
            chosen = [i for i, work in enumerate(works) if work.field == field]
            done |= zip(chosen, _encode(now, [works[i].texts for i in chosen], field), strict=True)
        return [done[i] for i in range(len(works))]

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _load(self) -> _Loaded:
        ref = resolve(self._model, self._root)
        encoder: Any = load_encoder(ref.folder, "query")
        encoder.encode(["."], "document")
        return _Loaded(ref.name, ref.folder, encoder)

    def _follow(self, every_s: float) -> None:
        from cluster.registry import find_uri

        while not self._ended.wait(every_s):
            try:
                version = find_uri(self._model, self._root)
                if f"{version.name}/{version.version}" != self._now.name:
                    self._now = self._load()
                    logger.info("serving %s", self._now.name)
                self.trouble = ""
            except (UsageError, RunError) as error:
                self.trouble = str(error)
                logger.warning("still serving %s: %s", self._now.name, error)


def _encode(model: _Loaded, requests: Sequence[Sequence[str]], field: str) -> list[Done]:
    """Each request's vectors; a request with a text that is too long is refused, and costs the others nothing."""
    lengths = [model.tokenizer(field).lengths(texts, field) for texts in requests]
    limit = model.tokenizer(field).max_tokens
    refused = [_too_long(found, limit) for found in lengths]
    kept = [text for texts, told in zip(requests, refused, strict=True) if not told for text in texts]
    vectors = model.encoder.encode(kept, field) if kept else np.zeros((0, model.dimensions), np.float32)
    done, at = [], 0
    for texts, tokens, told in zip(requests, lengths, refused, strict=True):
        n = 0 if told else len(texts)
        done.append(Done(model.name, vectors[at : at + n], int(tokens.sum()), told))
        at += n
    return done


def _too_long(lengths: np.ndarray, limit: int) -> str:
    if not (lengths > limit).any():
        return ""
    first = int(np.argmax(lengths > limit))
    return f"input[{first}] has {lengths[first]} tokens with its prompt, the model reads {limit}: shorten it"
