"""Hard negatives: searches every query's nearest documents, leaves out what may answer it, writes the source back.

    texts    unique queries and documents of the sources, each with a position     mining/texts.py
    vectors  of both, by an injected encoder, kept between runs                    mining/vectors.py
    search   the nearest documents, over shards, merged exactly                    mining/search.py
    filters  what is a negative, and which are taken                               mining/filters.py
    write    the source's rows with their negatives, as Parquet                    rewrite.py

Memory holds a block of queries with its candidates, 16 bytes for each text, and the negatives' positions and scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_services.items import TEXT
from data_services.mining import report as reporting
from data_services.mining.filters import Block, Fate, FilterConfig, by_guide, by_score, choose, known_false
from data_services.mining.report import Example, MiningReport
from data_services.mining.scorers import Guide, Miner, Scorer
from data_services.mining.search import best
from data_services.mining.texts import Lists, TextTable, positives_of, write_texts
from data_services.rewrite import replaced, rewrite
from data_services.schema import Column, UsageError
from data_services.store import StoredSource

_QUERIES_AT_ONCE = 4096
_EXAMPLES = 3

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


@dataclass(frozen=True)
class MiningTexts:
    """What is searched for and in: the queries of a source; its positives and hard negatives with a corpus's documents.

    positives of each query, over all of its rows; most_positives: the most that one lists
    """

    source: StoredSource
    queries: TextTable
    documents: TextTable
    positives: Lists
    most_positives: int

    @classmethod
    def of(cls, source: StoredSource, corpora: list[StoredSource], folder: Path) -> MiningTexts:
        """Writes the texts to `folder`. corpora: sources whose positives and hard negatives are candidates too.

        Raises UsageError where one of the sources holds images or sounds.
        """
        other = next((its for its in (source, *corpora) if its.kinds != TEXT), None)
        if other is not None:
            raise UsageError(
                f"source {other.name} holds {other.kinds.modality} pairs: hard negatives are mined of texts"
            )
        queries = write_texts(folder / "queries.arrow", [source], [Column.QUERY])
        documents = write_texts(folder / "documents.arrow", [source, *corpora], [Column.POSITIVES, Column.NEGATIVES])
        return cls(source, queries, documents, *positives_of(source, queries, documents))

    def block(self, start: int, stop: int, candidates: np.ndarray, scores: np.ndarray, scorer: Scorer) -> Block:
        """The queries start … stop-1 with their candidates; the scorer scores their positives."""
        positives = self.positives.part(start, stop)
        return Block(
            candidates,
            scores,
            positives,
            scorer.scores(positives.owners + start, positives.values),
            self.queries.ids[start:stop],
            self.queries.plain_ids[start:stop],
            self.documents.ids,
            self.documents.plain_ids,
        )


@dataclass
class Mined:
    """negatives [q, m] int64 positions of documents, best first, -1 behind the last; scores [q, m] float32.

    positive_scores [positives] float32, in the order of `MiningTexts.positives`; fates [Fate] counts of candidates
    """

    negatives: np.ndarray
    scores: np.ndarray
    positive_scores: np.ndarray
    fates: np.ndarray = field(default_factory=lambda: np.zeros(len(Fate), np.int64))

    @property
    def counts(self) -> np.ndarray:
        """[q] negatives of each query."""
        return (self.negatives >= 0).sum(axis=1)


def find_negatives(
    texts: MiningTexts,
    miner: Miner,
    config: FilterConfig,
    guide: Guide | None = None,
    queries_at_once: int = _QUERIES_AT_ONCE,
    on_progress: Progress = lambda what, done, of: None,
) -> Mined:
    """The negatives of every query."""
    q, window = len(texts.queries), config.window(texts.most_positives, guide is not None)
    depth = min(window[1] + texts.most_positives, len(texts.documents))
    mined = Mined(
        np.full((q, config.negatives), -1, np.int64),
        np.full((q, config.negatives), -np.inf, np.float32),
        np.empty(len(texts.positives.values), np.float32),
    )
    for start in range(0, q, queries_at_once):
        stop = min(start + queries_at_once, q)
        block = texts.block(start, stop, *miner.search(start, stop, depth), miner)
        if guide is not None and guide.use == "rescore":
            block = _rescored(texts, block, start, guide.scorer)
        fates = known_false(block, config)
        by_score(block, fates, config)
        if guide is not None and guide.use == "filter":
            positive = guide.scorer.scores(block.positives.owners + start, block.positives.values)
            alive = _alive_scores(block, fates, start, guide.scorer)
            by_guide(fates, alive, block.of_hardest(positive), guide.margin)
        taken = choose(block, fates, window, config)
        scores = np.where(taken, block.scores, -np.inf)
        mined.negatives[start:stop], mined.scores[start:stop] = _first(block.candidates, scores, taken, config)
        lists = texts.positives.offsets
        mined.positive_scores[lists[start] : lists[stop]] = block.positive_scores
        mined.fates += np.bincount(fates.ravel(), minlength=len(Fate))
        on_progress("mining", stop, q)
    return mined


def _alive_scores(block: Block, fates: np.ndarray, start: int, guide: Scorer) -> np.ndarray:
    """[q, k] the guide's scores of the candidates that are still there; -inf of the others."""
    scores = np.full(fates.shape, -np.inf, np.float32)
    rows, columns = np.nonzero(fates == 0)
    scores[rows, columns] = guide.scores(rows + start, block.candidates[rows, columns])
    return scores


def _rescored(texts: MiningTexts, block: Block, start: int, guide: Scorer) -> Block:
    there = np.where(block.candidates < 0, Fate.NOT_THERE, Fate.TAKEN)
    order = best(block.candidates, _alive_scores(block, there, start, guide), block.candidates.shape[1])
    return texts.block(start, start + len(order[0]), *order, guide)


def _first(
    candidates: np.ndarray, scores: np.ndarray, taken: np.ndarray, config: FilterConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The taken candidates of each row in their order, [q, negatives], with their scores."""
    width = min(config.negatives, candidates.shape[1])
    columns = np.argsort(~taken, axis=1, kind="stable")[:, :width]
    some = np.take_along_axis(taken, columns, 1)
    pad = ((0, 0), (0, config.negatives - width))
    positions = np.where(some, np.take_along_axis(candidates, columns, 1), -1)
    return (
        np.pad(positions, pad, constant_values=-1),
        np.pad(np.take_along_axis(scores, columns, 1), pad, constant_values=-np.inf),
    )


def write_source(texts: MiningTexts, mined: Mined, folder: Path) -> None:
    """The source's rows as Parquet with the mined negatives in place of its own.

    A source's own positive scores stay; where it has none they are the miner's, as the negatives' always are.
    """
    rewrite(texts.source, folder, lambda table, _: _with_negatives(table, texts, mined))


def written_columns(source: StoredSource) -> frozenset[str]:
    """Which of `Column.OPTIONAL` the written source has."""
    return source.columns | {Column.POSITIVE_SCORES, Column.NEGATIVE_SCORES}


def _with_negatives(table: pa.Table, texts: MiningTexts, mined: Mined) -> pa.Table:
    rows = texts.queries.positions(table.column(Column.QUERY_ID).to_numpy())
    negatives, there = mined.negatives[rows], mined.negatives[rows] >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(axis=1))]), pa.int32())
    chosen = negatives[there]
    columns = {
        Column.NEGATIVES: pa.array(texts.documents.take(chosen), pa.string()),
        Column.NEGATIVE_IDS: pa.array(texts.documents.ids[chosen]),
        Column.NEGATIVE_SCORES: pa.array(mined.scores[rows][there]),
    }
    for name, values in columns.items():
        table = replaced(table, name, pa.ListArray.from_arrays(offsets, values))
    if Column.POSITIVE_SCORES not in texts.source.columns:
        table = replaced(table, Column.POSITIVE_SCORES, _positive_scores(table, rows, texts, mined))
    return table


def _positive_scores(table: pa.Table, rows: np.ndarray, texts: MiningTexts, mined: Mined) -> pa.Array:
    lists = table.column(Column.POSITIVE_IDS)
    counts = pc.list_value_length(lists).to_numpy()
    documents = texts.documents.positions(pc.list_flatten(lists).to_numpy())
    n = len(texts.documents)
    pairs = texts.positives.owners * n + texts.positives.values  # ascending
    at = np.searchsorted(pairs, np.repeat(rows, counts) * n + documents)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(mined.positive_scores[at]))


def report(texts: MiningTexts, mined: Mined, config: FilterConfig) -> MiningReport:
    """The figures of a mining, with the first, a middle and the last query for the eye."""
    there = mined.negatives >= 0
    lists = texts.positives
    hardest = np.minimum.reduceat(mined.positive_scores, lists.offsets[:-1])
    scores = {
        "positive": reporting.spread(mined.positive_scores),
        "negative": reporting.spread(mined.scores[there]),
        "difference": reporting.spread((hardest[:, None] - mined.scores)[there]),
    }
    shown = np.unique(np.linspace(0, len(texts.queries) - 1, _EXAMPLES).astype(int))
    dropped = sum(
        pc.sum(pc.list_value_length(pq.read_table(path, columns=[Column.NEGATIVES]).column(0))).as_py()
        for path in texts.source.files
    )
    return MiningReport(
        rows=texts.source.rows,
        queries=len(texts.queries),
        documents=len(texts.documents),
        replaced=dropped,
        negatives_a_query=reporting.histogram(mined.counts),
        scores=scores,
        fates=reporting.fate_shares(mined.fates),
        examples=[_example(int(i), texts, mined) for i in shown],
    )


def _example(i: int, texts: MiningTexts, mined: Mined) -> Example:
    part = slice(texts.positives.offsets[i], texts.positives.offsets[i + 1])
    documents = texts.positives.values[part], mined.negatives[i][mined.negatives[i] >= 0]
    scores = mined.positive_scores[part], mined.scores[i]
    positives, negatives = (
        list(zip(s.tolist(), texts.documents.take(d), strict=False)) for s, d in zip(scores, documents, strict=True)
    )
    return Example(texts.queries.take(np.array([i]))[0], positives, negatives)
