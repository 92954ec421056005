"""The records of a global batch to token lists: which of their documents it shows, and what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_services.draws import row_keys
from data_services.items import TEXT, Kinds, items_of_sources
from data_services.schema import SOURCE_SHIFT, UNKNOWN, Column, Pairs, Tokenize
from data_services.views.config import Shown, Views

if TYPE_CHECKING:
    import pyarrow as pa


class GlobalBatch(Pairs):
    """A whole global batch, tokenised: b is B, and d counts the documents of all workers."""


def choose_positive(counts: np.ndarray, rows: np.ndarray, step: int, seed: int) -> np.ndarray:
    """[B] which of its `counts` [B] positives each row shows: a keyed hash of (seed, step, row)."""
    return (row_keys(rows, step, seed) % counts.astype(np.uint64)).astype(np.int64)


def choose_documents(
    right: np.ndarray, wrong: np.ndarray, chosen: np.ndarray, positives: int, negatives: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which documents of the records a batch shows, and of which record each is: (places [d], owners [d]).

    right, wrong [B] positives and hard negatives that the records have; chosen [B] the positive that comes first.
    After the chosen ones come further positives, in their order and round its end until a record shows `positives`
    of them, then the first `negatives` hard negatives. A place counts through the positives of all records end to
    end, then through their hard negatives.
    """
    further, nth = _each(np.minimum(right, positives) - 1)
    hard, rank = _each(np.minimum(wrong, negatives))
    answering = np.concatenate([np.arange(len(right)), further])
    within = np.concatenate([chosen, (chosen[further] + 1 + nth) % right[further]])
    places = [_starts(right)[answering] + within, right.sum() + _starts(wrong)[hard] + rank]
    return np.concatenate(places), np.concatenate([answering, hard])


def _starts(counts: np.ndarray) -> np.ndarray:
    """[n] where each of n lists begins when they stand end to end."""
    return np.cumsum(counts) - counts


def _each(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] counts -> i counts[i] times over for every i, and with it 0 .. counts[i]-1."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - _starts(counts)[of]


def tokenise(
    table: pa.Table,
    rows: np.ndarray,
    tokenize: Tokenize,
    step: int,
    seed: int,
    negatives: int = 0,
    positives: int = 1,
    views: Sequence[Views | None] = (),
    kinds: Sequence[Kinds] = (TEXT,),
) -> GlobalBatch:
    """The records of a global batch (`schema.Column`, [B] in the plan's order) as token lists.

    rows [B] int64 row keys; negatives, positives: at most so many of each record (`choose_documents`), the first
    positive by `choose_positive`. views: of each source; none: every text as it is. kinds: of each source, or of all.
    What the table lacks of `Column.OPTIONAL` is None in the batch.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def both(positive: str, negative: str) -> pa.ChunkedArray:
        """[d] the batch's documents' part of two list columns."""
        flat = [pc.list_flatten(table.column(name)) for name in (positive, negative)]
        return pa.chunked_array([chunk for column in flat for chunk in column.chunks]).take(places)

    def known(name: str, missing: float) -> np.ndarray | None:
        return table.column(name).fill_null(missing).to_numpy() if name in table.column_names else None

    right, wrong = (_lengths(table, name) for name in (Column.POSITIVES, Column.NEGATIVES))
    chosen = choose_positive(right, rows, step, seed)
    places, owners = choose_documents(right, wrong, chosen, positives, negatives)
    tasks = known(Column.TASK, UNKNOWN)
    of_queries = np.full(len(rows), UNKNOWN) if tasks is None else tasks
    of_documents = of_queries[owners]
    sources = rows >> SOURCE_SHIFT
    shown = Shown(
        queries=items_of_sources(table.column(Column.QUERY), [its.query for its in kinds], sources),
        documents=items_of_sources(
            both(Column.POSITIVES, Column.NEGATIVES), [its.document for its in kinds], sources[owners]
        ),
        keys=row_keys(rows, step, seed),
        document_ids=both(Column.POSITIVE_IDS, Column.NEGATIVE_IDS).to_numpy(),
        owners=owners,
        relations=np.where(places < right.sum(), 1, -1).astype(np.int8),
    )
    if any(views):
        shown = shown.viewed(views, sources)
    return GlobalBatch(
        step=step,
        queries=tokenize(shown.queries, "query", of_queries.tolist()),
        documents=tokenize(shown.documents, "document", of_documents.tolist()),
        query_ids=table.column(Column.QUERY_ID).to_numpy(),
        document_ids=shown.document_ids,
        owners=owners,
        relations=shown.relations,
        rows=rows,
        prompt_tokens=np.concatenate(
            [_prompt_tokens(tokenize, "query", of_queries), _prompt_tokens(tokenize, "document", of_documents)]
        ),
        scores=_scores(table, right, wrong, places),
        weights=known(Column.WEIGHT, 1.0),
        frequencies=known(Column.FREQUENCY, 1.0),
        labels=known(Column.LABEL, UNKNOWN),
        tasks=tasks,
        languages=known(Column.LANGUAGE, UNKNOWN),
        modalities=known(Column.MODALITY, UNKNOWN),
    )


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    """[B] texts of each record in a list column."""
    import pyarrow.compute as pc

    return pc.list_value_length(table.column(name)).to_numpy().astype(np.int64)


def _scores(table: pa.Table, right: np.ndarray, wrong: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """[d] float32 of the documents at `places`; NaN where their record has none, None where the table has none."""
    import pyarrow.compute as pc

    there, parts = False, []
    for name, texts in ((Column.POSITIVE_SCORES, right), (Column.NEGATIVE_SCORES, wrong)):
        scores = np.full(texts.sum(), np.nan, np.float32)
        if name in table.column_names:
            there, column = True, table.column(name)
            scores[np.repeat(column.is_valid().to_numpy(), texts)] = pc.list_flatten(column).to_numpy()
        parts.append(scores)
    return np.concatenate(parts)[places] if there else None


def _prompt_tokens(tokenize: Tokenize, field: str, tasks: np.ndarray) -> np.ndarray:
    """[n] int64 tokens of each text's prompt."""
    kinds, which = np.unique(tasks, return_inverse=True)
    return np.array([tokenize.prompt_tokens(field, task) for task in kinds.tolist()], np.int64)[which]
