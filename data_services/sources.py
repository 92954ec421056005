"""What a recipe may name as a source, and how its rows become records.

builtin:stdlib-code      the documented functions of this interpreter's standard library
builtin:glyphs, charts, pages, tones
                         pictures and sounds that are drawn here, with what they are in words
pairs.parquet            .parquet, .arrow, .feather, .jsonl, .csv, .tsv, .tar (WebDataset); text also as .gz or .zst
data/*.jsonl             a glob, or a list of files and globs
folder                   of such files; with `train*`, `validation*`, … among them, a split is those files
folder                   of BEIR (corpus, queries, qrels), or saved by Hugging Face `datasets`
s3://bucket/…, gs://…    the same in an object store
hf:owner/name            a data set of the Hugging Face hub, with `datasets` installed
package.module:function  a function of yours that yields dictionaries; it may take `split`
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from data_services import builtin
from data_services.convert import CODE_VERSION
from data_services.corpora.splits import SPLITS
from data_services.fields import Fields
from data_services.items import items_of
from data_services.layouts import LayoutName
from data_services.media.checks import MEDIA_KINDS
from data_services.origins import origin_of
from data_services.schema import Column, Item, Section, UsageError
from data_services.store import Report, StoredSource, store
from data_services.views.config import Views, check_views

_CLASS = "^=?[^=]"  # a field, or = and a name
_PARTS = ("query_parts", "positive_parts")
_NAMED_OTHERWISE = ("weight", "negatives", "media", *_PARTS)  # of `records.Fields`


class WeightFrom(Section):
    """A source's share of the mixture from a step on, until the next."""

    from_step: int = Field(0, ge=0, description="0 for the first one")
    share: float = Field(ge=0, description="0: nothing is drawn of it")


class SourceConfig(Section):
    """One source of pairs."""

    path: str | list[str] = Field(
        min_length=1,
        description="a file, glob, folder, s3:// or gs:// address, or a list of files; builtin:stdlib-code, "
        "hf:owner/name, or module:function of yours that yields dictionaries",
    )
    split: str = Field("train", min_length=1, description="split of a built-in corpus, folder, data set or function")
    format: LayoutName | None = Field(None, description="layout of the rows; none: recognised by their fields")
    query: str | None = Field(None, min_length=1, description="field of the query text; none: as the layout has it")
    positive: str | None = Field(
        None, min_length=1, description="field that holds the positive text, or a list; none: as the layout has it"
    )
    negatives: str | list[str] | None = Field(
        None,
        min_length=1,
        description="field that holds hard negatives, text or list, or several such fields; none: as the layout has it",
    )
    id: str | None = Field(None, min_length=1, description="field of the row's id; none: a hash of its texts")
    prompt: str | None = Field(None, min_length=1, description="field of a text that goes before the row's query")
    title: str | None = Field(None, min_length=1, description="field of a title that goes before each positive")
    relations: str | None = Field(
        None,
        min_length=1,
        description="field of 1 (answers), -1 (doesn't) or 0 (not known) for each text of `positive`: -1 becomes a "
        "hard negative, 0 is left out",
    )
    kinds: dict[str, Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]] = Field(
        {},
        description="fields that are no texts: image and audio hold bytes, or paths beside the file; another word is a "
        "kind that a tower of yours reads; none: recognised in Parquet, Arrow and tar",
    )
    query_parts: list[str] | None = Field(
        None, min_length=1, description="several fields that are the query together, in the place of `query`"
    )
    positive_parts: list[str] | None = Field(
        None, min_length=1, description="several fields that are the positive together, in the place of `positive`"
    )
    root: str | None = Field(
        None, min_length=1, description="folder that paths of images and sounds are relative to; none: the file's own"
    )
    corpus: str | None = Field(
        None,
        min_length=1,
        description="documents, by `_id`, `docid` or `id`, that `positive` and `negatives` name by id",
    )
    weight: Annotated[float, Field(gt=0)] | list[WeightFrom] | None = Field(
        None, description="share of the mixture, or one from each of some steps on; none: by the number of rows"
    )
    max_epochs: float | None = Field(
        None, gt=0, description="passes over this source in the whole run, at most; the others then take its share"
    )
    max_rows: int | None = Field(None, gt=0, description="rows of this source in the whole run, at most")
    positive_scores: str | None = Field(
        None, min_length=1, description="field of the positives' scores, one for each: a teacher's, or graded relevance"
    )
    negative_scores: str | None = Field(None, min_length=1, description="field of the hard negatives' scores")
    pair_weight: str | None = Field(None, min_length=1, description="field of the row's weight in the loss, 0 or more")
    frequency: str | None = Field(
        None,
        min_length=1,
        description="field that says how often the row's positives come in the data, 1 as usual: for "
        "objective.sampling_correction",
    )
    label: str | None = Field(None, pattern=_CLASS, description="field of the row's class, or =NAME for all rows")
    task: str | None = Field(
        None, pattern=_CLASS, description="field of the row's task, or =NAME for all rows; none: the source's name"
    )
    language: str | None = Field(None, pattern=_CLASS, description="field of the row's language, or =NAME for all rows")
    modality: str | None = Field(None, pattern=_CLASS, description="field of the row's modality, or =NAME for all rows")
    cluster: str | None = Field(
        None, pattern=_CLASS, description="field of the row's cluster, for `data.neighbours`: rows of one are alike"
    )
    views: Views | None = Field(None, description="what is shown of the texts, anew at every step; none: all")
    max_bytes: int = Field(
        16 << 20, gt=0, description="bytes of a row's texts, or of its line; longer rows are left out"
    )
    quarantine_share: float = Field(
        0.1, ge=0, le=1, description="share of malformed rows up to which they are left out; above it the run stops"
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> SourceConfig:
        if self.negative_scores is not None and self.negatives is None and self.format is None:
            raise ValueError(f"negative_scores ({self.negative_scores}) needs `negatives`, the field of their texts")
        if self.views and self.views.negatives and self.negatives is None and self.format is None:
            raise ValueError("views.negatives needs `negatives`, the field of their texts")
        if self.views and self.views.pair and not self.one_text:
            raise ValueError(
                f"views.pair takes query and positive from one text, but query is {self.query or 'query'!r} and "
                f"positive is {self.positive or 'positive'!r}; name one field as both"
            )
        if self.relations is not None and (self.positive_scores or self.negative_scores):
            raise ValueError("relations and scores exclude each other: which score is whose would be lost")
        return self

    @field_validator("kinds")
    @classmethod
    def _kinds_are_known(cls, kinds: dict[str, str]) -> dict[str, str]:
        for field, kind in kinds.items():
            if kind in ("text", "parts"):
                raise ValueError(f"{field!r} is of kind {kind}: name the fields that are no texts, each by itself")
            near = difflib.get_close_matches(kind, MEDIA_KINDS, 1, cutoff=0.7)
            if kind not in MEDIA_KINDS and near:
                raise ValueError(f"{field!r} is of kind {kind}; did you mean {near[0]}?")
        return kinds

    @model_validator(mode="after")
    def _parts_agree(self) -> SourceConfig:
        for side in ("query", "positive"):
            if getattr(self, side) is not None and getattr(self, f"{side}_parts") is not None:
                raise ValueError(f"{side} and {side}_parts exclude each other: name the field among the parts")
        if self.positive_parts is not None and self.negatives is not None:
            raise ValueError("negatives and positive_parts exclude each other: hard negatives have no parts")
        return self

    @model_validator(mode="after")
    def _weights_ascend(self) -> SourceConfig:
        steps = self.weight_steps
        if isinstance(self.weight, list) and (steps[:1] != [0] or sorted(set(steps)) != steps):
            raise ValueError(f"weight changes at steps {steps}: the first is 0, each later one after the last")
        return self

    @property
    def weight_steps(self) -> list[int]:
        """The steps at which its weight changes, 0 among them; none where it has one weight or none."""
        return [its.from_step for its in self.weight] if isinstance(self.weight, list) else []

    def weight_at(self, step: int) -> float | None:
        """Its share of the mixture from a step on."""
        if not isinstance(self.weight, list):
            return self.weight
        return [its.share for its in self.weight if its.from_step <= step][-1]

    def limit(self, rows: int) -> int | None:
        """Rows of it in the whole run, at most, where it has so many."""
        by_epochs = None if self.max_epochs is None else int(self.max_epochs * rows + 1e-6)
        return min((limit for limit in (by_epochs, self.max_rows) if limit is not None), default=None)

    @property
    def one_text(self) -> bool:
        """Whether its rows are texts without queries: one field is both."""
        return self.query is not None and self.query == self.positive

    @property
    def possible_columns(self) -> frozenset[str]:
        """Which of `Column.OPTIONAL` its records may turn out to have: those named, or of a layout that has some."""
        named = self.fields(Fields("query", "positive")).columns
        recognised = self.format is None and None in (self.query, self.positive)
        scored = recognised or self.format in ("beir", "flagembedding")
        return named | {Column.POSITIVE_SCORES, Column.NEGATIVE_SCORES} if scored else named

    def fields(self, layout: Fields) -> Fields:
        """Where the parts of a record stand: as this names them, else as the layout has them."""
        negatives = (self.negatives,) if isinstance(self.negatives, str) else self.negatives
        given = {name: getattr(self, name) for name in Fields._fields if name not in _NAMED_OTHERWISE}
        given |= {"weight": self.pair_weight, "negatives": tuple(negatives) if negatives else None}
        given |= {name: tuple(its) for name in _PARTS if (its := getattr(self, name)) is not None}
        return layout._replace(**{name: value for name, value in given.items() if value is not None})

    def texts_alone(self, path: str | list[str], split: str) -> SourceConfig:
        """Queries and positives at another path: what a model is scored on. Fields of the same names; where this
        source has texts without queries, as its layout has them."""
        if self.one_text:
            return SourceConfig(path=path, split=split)
        sides = ("query", "positive", *_PARTS, "kinds", "root", "title", "prompt")
        kept = ("format", *sides, "corpus", "max_bytes", "quarantine_share")
        return SourceConfig(path=path, split=split, **{name: getattr(self, name) for name in kept})

    @property
    def shown(self) -> str:
        """The path in a message."""
        return self.path if isinstance(self.path, str) else f"{self.path[0]} (and {len(self.path) - 1} more)"


def columns_available(columns: Iterable[frozenset[str]]) -> set[str]:
    """Which of `Column.OPTIONAL` every source has, of those that each one has: what a loss may rely on.

    `task` is always there, since a source without one goes by its name.
    """
    return {Column.TASK} | set.intersection(*map(set, columns))


def open_source(config: SourceConfig, home: Path, report: Report | None = None) -> StoredSource:
    """The source as Parquet under home/data, converted the first time and when it changed.

    report  takes (finished parts, parts) while it is converted

    Raises UsageError, one sentence, for a path, split or field that isn't there, for a source without a single
    usable row, and where more than `quarantine_share` of its rows are malformed; RunError where the disk is full.
    """
    stored = convert_source(config, home, report)
    check_views(config.views, stored.kinds, stored.name)
    check_quarantine(stored, config.quarantine_share)
    return stored


def convert_source(config: SourceConfig, home: Path, report: Report | None = None) -> StoredSource:
    """As `open_source`, however many rows are malformed."""
    origin = origin_of(config, home)
    return store(origin.name, slot_of(origin.name, origin.key, config, home), origin.stamp, origin.reading, report)


def slot_of(name: str, key: str, config: SourceConfig, home: Path) -> Path:
    """Where the conversions of a source lie: one slot for each path, split and mapping of fields."""
    keys = {*Fields._fields, "pair_weight", "format", "corpus", "max_bytes"} - {"weight", "media"}
    mapping = config.model_dump(include=keys) | config.model_dump(include={"kinds", "root"}, exclude_defaults=True)
    identity = json.dumps([key, config.split, mapping, CODE_VERSION], sort_keys=True)
    digest = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    return home / "data" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{digest}"


def check_quarantine(stored: StoredSource, share: float) -> None:
    """UsageError where more than that share of a source's rows is malformed."""
    malformed = sum(stored.quarantined.values())
    if malformed > share * (malformed + stored.rows):
        reason, count = max(stored.quarantined.items(), key=lambda item: item[1])
        raise UsageError(
            f"source {stored.name}: {malformed} of {malformed + stored.rows} rows are malformed, more than "
            f"quarantine_share={share:g} allows; {count} × {reason}; see {stored.folder / 'quarantine.parquet'}"
        )


class RetrievalPool(NamedTuple):
    """queries, unique by id; documents, unique by id; for each query the grades of its documents by position."""

    queries: list[Item]
    documents: list[Item]
    relevant: list[dict[int, float]]


def retrieval_pool(source: StoredSource) -> RetrievalPool:
    """The source as a retrieval task: every positive is a candidate for every query; first come first.

    Scores that are whole numbers of 1 or more are grades; where one of them isn't (a teacher's), every grade is 1.
    """
    table = source.table()
    items = items_of(table[Column.QUERY], source.kinds.query)
    answers = items_of(pc.list_flatten(table[Column.POSITIVES]), source.kinds.document)
    ids, ends = table[Column.QUERY_ID].to_pylist(), np.cumsum(pc.list_value_length(table[Column.POSITIVES]).to_numpy())
    of_answers, grades = pc.list_flatten(table[Column.POSITIVE_IDS]).to_pylist(), _grades(table)
    queries: dict[int, Item] = {}
    documents: dict[int, Item] = {}
    positions: dict[int, int] = {}
    relevant: dict[int, dict[int, float]] = {}
    for query, item, begin, end in zip(ids, items, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        queries.setdefault(query, item)
        judged = relevant.setdefault(query, {})
        for its, document, grade in zip(of_answers[begin:end], answers[begin:end], grades[begin:end], strict=True):
            documents.setdefault(its, document)
            place = positions.setdefault(its, len(positions))
            judged[place] = max(grade, judged.get(place, grade))
    return RetrievalPool(list(queries.values()), list(documents.values()), list(relevant.values()))


def _grades(table: pa.Table) -> list[float]:
    """Of every row's positives, end to end."""
    scores = np.ones(len(pc.list_flatten(table[Column.POSITIVE_IDS])))
    if Column.POSITIVE_SCORES in table.column_names:
        given = pc.list_flatten(table[Column.POSITIVE_SCORES]).to_numpy()
        scores = given if len(given) == len(scores) and ((given >= 1) & (given % 1 == 0)).all() else scores
    return scores.tolist()


class PoolClasses(NamedTuple):
    """side     that of the items which are no texts; where both sides are alike, the documents
    numbers  of each of its items in `retrieval_pool`: equal where the rows' labels are, UNKNOWN where there is none
    """

    side: Literal["query", "document"]
    numbers: list[int]


def pool_classes(source: StoredSource) -> PoolClasses:
    """By the rows' `label`; an item that stands in several rows has the first one's."""
    table, numbers = source.table(), dict[int, int]()
    of_queries = source.kinds.document == "text" and source.kinds.query != "text"
    ids = table[Column.QUERY_ID].to_pylist() if of_queries else table[Column.POSITIVE_IDS].to_pylist()
    for its, label in zip(ids, table[Column.LABEL].to_pylist(), strict=True):
        for each in [its] if of_queries else its:
            numbers.setdefault(each, label)
    return PoolClasses("query" if of_queries else "document", list(numbers.values()))


class Corpus(NamedTuple):
    """Documents to search, and the name of each, in step."""

    names: list[str]
    texts: list[str]


def builtin_corpus(home: Path) -> Corpus:
    """Every function and class of builtin:stdlib-code, all splits, unique by text, for `gyre query`."""
    by_text: dict[str, str] = {}
    for split in SPLITS:
        path = f"builtin:{builtin.STDLIB_CODE}"
        table = open_source(SourceConfig(path=path, split=split), home).table()
        for name, texts in zip(table[Column.ID].to_pylist(), table[Column.POSITIVES].to_pylist(), strict=True):
            by_text.setdefault(texts[0], name)
    named = sorted((name, text) for text, name in by_text.items())
    return Corpus([name for name, _ in named], [text for _, text in named])
