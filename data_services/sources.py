"""What a recipe may name as a source, and how its rows become records.

builtin:stdlib-code      the documented functions of this interpreter's standard library
pairs.parquet            one row a record
pairs.jsonl[.gz]         one JSON object a line
folder                   of such files; with `train*`, `validation*`, … among them, a split is those files
package.module:function  a function of yours that yields dictionaries; it may take `split`
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import Field, model_validator

from data_services import builtin
from data_services.imports import import_object
from data_services.records import Fields, Malformed, Row, as_row, jsonl_rows, parquet_rows, records
from data_services.schema import Column, Section, UsageError
from data_services.store import CODE_VERSION, StoredSource, store
from data_services.views.config import Views

_BUILTIN = "builtin:"
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_CLASS = "^=?[^=]"  # a field, or = and a name
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
# Names that make a file or a folder one split of a data set.
_SPLITS = ("train", "validation", "valid", "val", "dev", "heldout", "test")


class SourceConfig(Section):
    """One source of pairs."""

    path: str = Field(
        description="builtin:stdlib-code, a .parquet, .jsonl or .jsonl.gz file, a folder of them, "
        "or module:function of yours that yields dictionaries"
    )
    split: str = Field("train", min_length=1, description="split of a built-in corpus, folder or function")
    query: str = Field("query", min_length=1, description="field of the query text")
    positive: str = Field("positive", min_length=1, description="field that holds the positive text, or a list")
    negatives: str | None = Field(None, min_length=1, description="field that holds hard negatives, text or list")
    id: str | None = Field(None, min_length=1, description="field of the row's id; none: where it stands")
    title: str | None = Field(None, min_length=1, description="field of a title that goes before each positive")
    weight: float | None = Field(None, gt=0, description="share of the mixture; none: by the number of rows")
    positive_scores: str | None = Field(
        None, min_length=1, description="field of the positives' scores, one for each: a teacher's, or graded relevance"
    )
    negative_scores: str | None = Field(None, min_length=1, description="field of the hard negatives' scores")
    pair_weight: str | None = Field(None, min_length=1, description="field of the row's weight in the loss, 0 or more")
    label: str | None = Field(None, pattern=_CLASS, description="field of the row's class, or =NAME for all rows")
    task: str | None = Field(
        None, pattern=_CLASS, description="field of the row's task, or =NAME for all rows; none: the source's name"
    )
    language: str | None = Field(None, pattern=_CLASS, description="field of the row's language, or =NAME for all rows")
    modality: str | None = Field(None, pattern=_CLASS, description="field of the row's modality, or =NAME for all rows")
    views: Views | None = Field(None, description="what is shown of the texts, anew at every step; none: all")

    @model_validator(mode="after")
    def _fields_agree(self) -> SourceConfig:
        if self.negative_scores is not None and self.negatives is None:
            raise ValueError(f"negative_scores ({self.negative_scores}) needs `negatives`, the field of their texts")
        if self.views and self.views.negatives and self.negatives is None:
            raise ValueError("views.negatives needs `negatives`, the field of their texts")
        if self.views and self.views.pair and not self.has_texts_only:
            raise ValueError(
                f"views.pair takes query and positive from one text, but query is {self.query!r} and positive is "
                f"{self.positive!r}; name one field as both"
            )
        return self

    @property
    def has_texts_only(self) -> bool:
        """Whether one field is query and positive."""
        return self.query is not None and self.query == self.positive

    @property
    def fields(self) -> Fields:
        """Where the parts of a record stand in a row."""
        return Fields(weight=self.pair_weight, **{n: getattr(self, n) for n in Fields._fields if n != "weight"})

    @property
    def columns(self) -> frozenset[str]:
        """Which of `Column.OPTIONAL` its records will have."""
        return self.fields.columns

    def texts_alone(self, path: str, split: str) -> SourceConfig:
        """Queries and positives at another path: what a model is scored on. Fields of the same names; where this
        source has texts without queries, `query` and `positive`."""
        if self.has_texts_only:
            return SourceConfig(path=path, split=split)
        return SourceConfig(path=path, split=split, query=self.query, positive=self.positive, title=self.title)


class _HasColumns(Protocol):
    @property
    def columns(self) -> frozenset[str]: ...


def columns_available(sources: Iterable[_HasColumns]) -> set[str]:
    """Which of `Column.OPTIONAL` every one of the sources has, configured or stored: what a loss may rely on.

    `task` is always there, since a source without one goes by its name.
    """
    return {Column.TASK} | set.intersection(*(set(source.columns) for source in sources))


@dataclass(frozen=True)
class _Origin:
    """Where rows come from. `key` tells sources apart, `stamp` if one changed (None: only reading tells)."""

    name: str
    key: str
    stamp: dict[str, Any] | None
    rows: Callable[[], Iterator[Row | Malformed]]


def open_source(config: SourceConfig, home: Path) -> StoredSource:
    """The source as Parquet under home/data, converted the first time and when it changed.

    Raises UsageError, one sentence, for a path, split or field that isn't there and for a source without a
    single usable row; RunError where the disk is full.
    """
    origin = _origin(config)
    fields = config.fields
    identity = json.dumps([origin.key, config.split, fields, CODE_VERSION])
    key = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    slot = home / "data" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', origin.name)}-{key}"
    return store(origin.name, slot, origin.stamp, lambda: records(origin.rows(), fields, config.path), fields.columns)


class RetrievalPool(NamedTuple):
    """queries, unique by text; documents, unique by text; for each query the positions of its documents."""

    queries: list[str]
    documents: list[str]
    relevant: list[set[int]]


def retrieval_pool(source: StoredSource) -> RetrievalPool:
    """The source as a retrieval task: every positive is a candidate for every query; first come first."""
    table = source.table()
    documents: dict[str, int] = {}
    relevant: dict[str, set[int]] = {}
    for query, positives in zip(table[Column.QUERY].to_pylist(), table[Column.POSITIVES].to_pylist(), strict=True):
        relevant.setdefault(query, set()).update(documents.setdefault(p, len(documents)) for p in positives)
    return RetrievalPool(list(relevant), list(documents), list(relevant.values()))


class Corpus(NamedTuple):
    """Documents to search, and the name of each, in step."""

    names: list[str]
    texts: list[str]


def builtin_corpus(home: Path) -> Corpus:
    """Every function and class of builtin:stdlib-code, all splits, unique by text, for `gyre query`."""
    by_text: dict[str, str] = {}
    for split in builtin.SPLITS:
        path = f"{_BUILTIN}{builtin.STDLIB_CODE}"
        table = open_source(SourceConfig(path=path, split=split), home).table()
        for name, texts in zip(table[Column.ID].to_pylist(), table[Column.POSITIVES].to_pylist(), strict=True):
            by_text.setdefault(texts[0], name)
    named = sorted((name, text) for text, name in by_text.items())
    return Corpus([name for name, _ in named], [text for _, text in named])


# Where rows come from.


def _origin(config: SourceConfig) -> _Origin:
    if config.path.startswith(_BUILTIN):
        return _builtin_origin(config)
    path = Path(config.path).expanduser()
    if not path.exists() and _IMPORT_PATH.fullmatch(config.path):
        return _function_origin(config)
    if not path.exists():
        raise UsageError(f"source {config.path} does not exist{_nearest_file(path)}")
    return _file_origin(config, path.resolve())


def _builtin_origin(config: SourceConfig) -> _Origin:
    corpus = config.path.removeprefix(_BUILTIN)
    if corpus not in builtin.CORPORA:
        known = [f"{_BUILTIN}{name}" for name in builtin.CORPORA]
        raise UsageError(f"no built-in source {config.path}; nearest: {_nearest(config.path, known)}")
    if config.split not in builtin.SPLITS:
        raise UsageError(f"{config.path} has no split {config.split!r}; it has {', '.join(sorted(builtin.SPLITS))}")

    def rows() -> Iterator[Row]:
        for pair in builtin.stdlib_code()[config.split]:
            yield Row(pair.name, {"query": pair.query, "positive": pair.positive})

    stamp = builtin.stdlib_stamp()
    return _Origin(f"{corpus}-{config.split}", f"{config.path} {stamp['python']}", stamp, rows)


def _function_origin(config: SourceConfig) -> _Origin:
    """A user's generator. What it reads isn't known, so it runs every time and its rows tell what changed."""
    function = import_object(config.path, f"source {config.path}")
    parameters = inspect.signature(function).parameters
    if "split" not in parameters and config.split != "train":
        raise UsageError(f"source {config.path} takes no argument `split`, but split is {config.split!r}")
    keywords = {"split": config.split} if "split" in parameters else {}

    def rows() -> Iterator[Row | Malformed]:
        for number, fields in enumerate(function(**keywords), start=1):
            yield as_row(f"{config.path}:{number}", fields)

    return _Origin(f"{config.path}-{config.split}", config.path, None, rows)


def _file_origin(config: SourceConfig, path: Path) -> _Origin:
    root = path if path.is_dir() else path.parent
    files = _split_files(config, path) if path.is_dir() else [path]
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UsageError(f"source {config.path} is none of {', '.join(_SUFFIXES)}, nor a folder of them")
        if config.split != "train":
            raise UsageError(
                f"source {config.path} is a single file and has no split {config.split!r}; leave `split` out"
            )
    names = [file.relative_to(root).as_posix() for file in files]

    def rows() -> Iterator[Row | Malformed]:
        for file, name in zip(files, names, strict=True):
            if file.suffix == ".parquet":
                yield from parquet_rows(file, name, config.fields)
            else:
                yield from jsonl_rows(file, name)

    states = [(name, file.stat()) for file, name in zip(files, names, strict=True)]
    stamp = {"files": [[name, state.st_size, state.st_mtime_ns] for name, state in states]}
    stem = path.name.split(".")[0] or path.name
    return _Origin(stem if path.is_file() else f"{stem}-{config.split}", str(path), stamp, rows)


def _split_files(config: SourceConfig, folder: Path) -> list[Path]:
    """The files of a split, sorted. A folder that names no splits is one split, called train."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.name.endswith(_SUFFIXES)
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    )
    if not files:
        raise UsageError(f"source {config.path} is a folder without {', '.join(_SUFFIXES)} files")

    def belongs(file: Path, split: str) -> bool:
        *folders, name = file.relative_to(folder).parts
        return split in folders or re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", name) is not None

    of_split = [file for file in files if belongs(file, config.split)]
    if of_split:
        return of_split
    present = [split for split in _SPLITS if any(belongs(file, split) for file in files)]
    if present or config.split != "train":
        has = f"it has {', '.join(present)}" if present else "its files name no splits; leave `split` out"
        raise UsageError(f"source {config.path} has no split {config.split!r}; {has}")
    return files


def _nearest(name: str, known: list[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _nearest_file(path: Path) -> str:
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; beside it is {near[0]}" if near else ""
