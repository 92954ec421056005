"""Retrieval from a large corpus: encoded into files by all workers, searched exactly in shards, as for mining."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.models.folder import fingerprint
from data_services.schema import Encoder, Item
from evaluation.vectors import Vectors

if TYPE_CHECKING:
    from data_services.embed import EmbeddedCorpus, Workers
    from data_services.mining.search import Search
    from data_services.mining.texts import TextTable
    from data_services.mining.vectors import Vectors as VectorFile

LARGE = 200_000  # documents, from which on vectors go to files: 300 MB of 384 dimensions
_QUERIES_AT_ONCE = 4096


class ShardedVectors(Vectors):
    """A model's vectors, of which searches in a corpus of LARGE documents or more go over the workers.

    Their vectors stay under HOME/vectors by the contents of model and texts: a second evaluation encodes none of them.
    folder   of the model
    workers  Ray actors; 1 without a cluster: this process
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        root: Path,
        workers: int = 1,
        on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
        large: int = LARGE,
    ) -> None:
        super().__init__(encoder)
        self._folder, self._root, self._workers, self._tell, self._large = folder, root, workers, on_progress, large

    def nearest(self, queries: Sequence[Item], documents: Sequence[Item], k: int) -> tuple[np.ndarray, np.ndarray]:
        asked = [query for query in queries if isinstance(query, str)]
        texts = [document for document in documents if isinstance(document, str)]
        others = len(asked) < len(queries) or len(texts) < len(documents)  # images and sounds
        if self.tokens or others or len(documents) < self._large:
            return super().nearest(queries, documents, k)
        from cluster.embedding import workers_on

        self._root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self._root, prefix=".texts-")))
            workers = stack.enter_context(workers_on(1 if self._here else self._workers, self._root))
            of_queries = self._encoded(place, asked, "query", workers)
            of_documents = self._encoded(place, texts, "document", workers)
            search = self._search(of_queries, of_documents, stack)
            blocks = [
                search(start, min(start + _QUERIES_AT_ONCE, len(queries)), k)
                for start in range(0, len(queries), _QUERIES_AT_ONCE)
            ]
        return np.concatenate([found for found, _ in blocks]), np.concatenate([scores for _, scores in blocks])

    @property
    def _here(self) -> bool:
        return self._workers == 1 and not os.environ.get("RAY_ADDRESS")

    def _encoded(
        self, place: Path, texts: Sequence[str], side: Literal["query", "document"], workers: Workers
    ) -> VectorFile:
        from cluster.embedding import load_encoder
        from data_services.embed import EmbedConfig, embed
        from data_services.mining.texts import table_of
        from data_services.mining.vectors import kept

        table: TextTable = table_of(place / f"{side}.arrow", texts)
        of_model = fingerprint(self._folder)

        def embedded(into: Path) -> EmbeddedCorpus:
            load, config = partial(load_encoder, self._folder, side), EmbedConfig(field=side)
            return embed(table, load, into, config, model=of_model, workers=workers, on_progress=self._follow)

        path = self._root / "vectors" / f"{of_model[:16]}-{side}-{table.fingerprint[:16]}.f32"
        return kept(path, embedded)

    def _follow(self, done: int, of: int) -> None:
        self._tell({"kind": "step", "unit": "text", "step": done, "steps": of})

    def _search(self, queries: VectorFile, documents: VectorFile, stack: ExitStack) -> Search:
        from data_services.mining.search import ClusterSearch, LocalSearch, SearchConfig, shards

        parts = shards(queries, documents, SearchConfig(), self._workers)
        if self._here:
            return LocalSearch(parts)
        from cluster.config import ClusterConfig
        from cluster.session import connect

        stack.enter_context(connect(ClusterConfig(workers=self._workers), self._root))
        return ClusterSearch(parts, self._workers)
