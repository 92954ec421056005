"""`gyre mine`: opens model, source and guide, places the search, and writes the mined source."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.models.folder import fingerprint
from cluster.models.reference import resolve
from cluster.paths import home
from data_services.items import TEXT
from data_services.mine import MiningTexts, Progress, find_negatives, report, write_source, written_columns
from data_services.mining.filters import FilterConfig
from data_services.mining.report import MiningReport
from data_services.mining.search import ClusterSearch, LocalSearch, Search, SearchConfig, shards
from data_services.rewrite import new_folder, publish, recipe_keys
from data_services.schema import UsageError
from data_services.sources import SourceConfig, open_source

if TYPE_CHECKING:
    from data_services.embed import Workers
    from data_services.mining.scorers import Miner, Scorer
    from data_services.mining.vectors import Vectors
    from data_services.store import StoredSource

BM25 = "bm25"
MANIFEST = "_mined.json"  # other readers of a folder of Parquet pass over names with _
_CROSS_ENCODER_BATCH = 32


@dataclass(frozen=True)
class MiningJob:
    """What is mined and how.

    model          as everywhere, or `bm25`
    corpora        sources whose documents are candidates too
    guide          a second model; cross_encoder: a folder or hub id that Sentence Transformers loads. One at most
    guide_use, guide_margin: see `scorers.Guide`
    workers        Ray actors that encode, and search; 1 without a cluster: this process
    """

    model: str
    source: SourceConfig
    out: Path
    filters: FilterConfig = field(default_factory=FilterConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    corpora: tuple[SourceConfig, ...] = ()
    guide: str | None = None
    cross_encoder: str | None = None
    guide_use: Literal["filter", "rescore"] = "filter"
    guide_margin: float = 0.0
    workers: int = 1


@dataclass(frozen=True)
class MiningResult:
    """folder: the source with its negatives; keys: as which a recipe reads its columns. report: what was found."""

    folder: Path
    model: str
    keys: dict[str, str]
    report: MiningReport

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "model": self.model, "keys": self.keys, **self.report.as_dict()}


def mine(job: MiningJob, root: Path | None = None, on_progress: Progress = lambda what, done, of: None) -> MiningResult:
    """Mines hard negatives for a source and writes it with them to `job.out`, all of it or nothing.

    Vectors stay under the home, by the contents of model and texts: a second mining with other filters, or one after
    a killed one, doesn't encode again. Raises UsageError for what isn't there or doesn't fit.
    """
    root = root or home()
    if job.guide and job.cross_encoder:
        raise UsageError("--guide and --cross-encoder are two second opinions: give one")
    if job.model == BM25 and job.search.index == "ivf":
        raise UsageError("--index ivf searches vectors, and bm25 has none: leave it out")
    source, corpora = open_source(job.source, root), [open_source(c, root) for c in job.corpora]
    if other := next((its for its in (source, *corpora) if its.kinds != TEXT), None):
        raise UsageError(f"source {other.name} isn't of texts alone; hard negatives are mined among texts")
    with ExitStack() as stack:
        from data_services.mining.scorers import Guide

        making = new_folder(job.out)
        stack.callback(shutil.rmtree, making, ignore_errors=True)
        texts = MiningTexts.of(source, corpora, making)
        opened = _Opened(texts, job, root, stack, on_progress)
        miner, model = opened.miner()
        second, of_guide = opened.second_opinion()
        guide = Guide(second, job.guide_use, job.guide_margin) if second else None
        mined = find_negatives(texts, miner, job.filters, guide, job.search.query_block, on_progress)
        found = report(texts, mined, job.filters)
        write_source(texts, mined, making / "source")
        publish(
            making,
            job.out,
            _manifest(
                job,
                source,
                corpora,
                {"model": model, "guide": of_guide, "guide_use": job.guide_use, "guide_margin": job.guide_margin},
                found,
            ),
            MANIFEST,
        )
    return MiningResult(job.out.absolute(), model["name"], recipe_keys(written_columns(source)), found)


def _manifest(
    job: MiningJob, source: StoredSource, corpora: list[StoredSource], models: dict[str, Any], found: MiningReport
) -> dict[str, Any]:
    """Everything that the negatives are a function of, and the figures."""

    def of(stored: StoredSource, config: SourceConfig) -> dict[str, Any]:
        return {"fingerprint": stored.fingerprint, **config.model_dump(exclude_defaults=True)}

    return {
        **models,
        "source": of(source, job.source),
        "corpora": [of(*both) for both in zip(corpora, job.corpora, strict=True)],
        "filters": job.filters.model_dump(),
        "search": job.search.model_dump(),
        "report": {name: value for name, value in asdict(found).items() if name != "examples"},
    }


class _Opened:
    """The models of a job, each opened when its turn comes and let go when its vectors are there."""

    def __init__(self, texts: MiningTexts, job: MiningJob, root: Path, stack: ExitStack, on_progress: Progress) -> None:
        self.texts, self.job, self.root, self.stack, self.on_progress = texts, job, root, stack, on_progress

    def miner(self) -> tuple[Miner, dict[str, str]]:
        from data_services.mining.scorers import VectorMiner

        if self.job.model == BM25:
            return self._bm25(), {"name": BM25}
        (queries, documents), about = self._vectors(self.job.model)
        return VectorMiner(queries, documents, self._search(queries, documents)), about

    def second_opinion(self) -> tuple[Scorer | None, dict[str, str] | None]:
        from data_services.mining.scorers import PairScorer, VectorScorer

        if self.job.cross_encoder:
            predict = cross_encoder(self.job.cross_encoder)
            return PairScorer(self.texts.queries, self.texts.documents, predict), {"name": self.job.cross_encoder}
        if self.job.guide == BM25:
            return self._bm25(), {"name": BM25}
        if self.job.guide:
            vectors, about = self._vectors(self.job.guide)
            return VectorScorer(*vectors), about
        return None, None

    def _bm25(self) -> Miner:
        from data_services.mining.scorers import BM25Miner
        from evaluation.retrieval import BM25Config, terms

        config = BM25Config()
        return BM25Miner(self.texts.queries, self.texts.documents, terms, config.k1, config.b)

    def _vectors(self, model: str) -> tuple[tuple[Vectors, Vectors], dict[str, str]]:
        """Those of queries and documents, kept under HOME/vectors by the contents of model and texts."""
        from cluster.embedding import vectors_of

        ref = resolve(model, self.root)
        of_model = fingerprint(ref.folder)
        how = (ref.folder, of_model, self.root, self.workers, self.on_progress)
        both = vectors_of(self.texts.queries, "query", *how), vectors_of(self.texts.documents, "document", *how)
        return both, {"name": ref.name, "fingerprint": of_model}

    @cached_property
    def workers(self) -> Workers:
        """Where texts are encoded."""
        from cluster.embedding import workers_on

        one_here = self.job.workers == 1 and not os.environ.get("RAY_ADDRESS")
        return self.stack.enter_context(workers_on(1 if one_here else self.job.workers, self.root))

    def _search(self, queries: Vectors, documents: Vectors) -> Search:
        workers = self.job.workers
        parts = shards(queries, documents, self.job.search, workers)
        if workers == 1 and not os.environ.get("RAY_ADDRESS"):
            return LocalSearch(parts)
        from cluster.config import ClusterConfig
        from cluster.session import connect

        self.stack.enter_context(connect(ClusterConfig(workers=workers), self.root))
        return ClusterSearch(parts, workers)


def cross_encoder(model: str, key: str = "--cross-encoder") -> Callable[[Sequence[str], Sequence[str]], Any]:
    """The scores of pairs by a cross-encoder that Sentence Transformers loads; `key` named it."""
    from sentence_transformers import CrossEncoder

    try:
        loaded = CrossEncoder(model, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise UsageError(f"{key} {model}: {str(error).splitlines()[0]}") from error

    def predict(queries: Sequence[str], documents: Sequence[str]) -> Any:
        pairs = list(zip(queries, documents, strict=True))
        return loaded.predict(pairs, batch_size=_CROSS_ENCODER_BATCH, show_progress_bar=False)

    return predict
