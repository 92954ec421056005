"""Where the rows of a configured source come from: which files and parts, and what tells that they changed."""

from __future__ import annotations

import difflib
import inspect
import json
import posixpath
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_services.corpora.catalogue import corpora
from data_services.corpora.splits import SPLITS
from data_services.fields import Fields, check_media_fields
from data_services.files import File, Found, find, is_remote, stamp_of
from data_services.imports import import_object
from data_services.items import TEXT, Kind
from data_services.layouts import Layout, layout_of
from data_services.readers import hub
from data_services.readers.beside import with_files
from data_services.readers.blocks import Block, Want, blocks_of_rows
from data_services.readers.formats import FOLDER_SUFFIXES, SUFFIXES, fields_of, media_of, parts_of
from data_services.readers.joined import BEIR_FIELDS, CorpusPart, beir_parts
from data_services.records import Malformed, Row, as_row
from data_services.schema import UsageError
from data_services.store import Reading

if TYPE_CHECKING:
    from data_services.sources import SourceConfig

_BUILTIN = "builtin:"
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# Names that make a file or a folder one split of a data set.
_SPLITS = ("train", "validation", "valid", "val", "dev", "heldout", "test")
_PLAIN = Layout("pairs", Fields("query", "positive"))


@dataclass(frozen=True)
class Origin:
    """One source. `key` tells sources apart, `stamp` if one changed (None: only reading tells).

    present  the fields of its first rows, where that is known before they are read
    """

    name: str
    key: str
    stamp: Callable[[], Any] | None
    reading: Callable[[], Reading]
    present: Callable[[], Sequence[str]] = tuple


def origin_of(config: SourceConfig, home: Path) -> Origin:
    """Raises UsageError for a path or split that isn't there, RunError where a store or the hub doesn't answer."""
    if isinstance(config.path, str):
        if config.path.startswith(_BUILTIN):
            return _builtin(config, config.path)
        if config.path.startswith(hub.PREFIX):
            return _of_hub(config, config.path)
        if _IMPORT_PATH.fullmatch(config.path) and not Path(config.path).exists():
            return _function(config, config.path)
    return _of_files(config)


@dataclass(frozen=True)
class RowsPart:
    """Rows that only this process can read. Nothing tells whether they are those of another time: `key` is new."""

    name: str
    rows: Callable[[], Iterable[Row | Malformed]]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    files: ClassVar[tuple[File, ...]] = ()

    def blocks(self, want: Want) -> Iterator[Block]:
        return with_files(blocks_of_rows(self.name, self.rows(), want.block_rows), want, None)


def _want(config: SourceConfig, layout: Layout, media: Mapping[str, Kind] | None = None) -> Want:
    """media: which fields hold images and sounds, as the rows show it; the recipe comes first."""
    fields = config.fields(layout.fields)
    fields = fields._replace(media=tuple(sorted((config.kinds or media or dict(layout.fields.media)).items())))
    check_media_fields(fields, config.shown)
    return Want(fields, config.max_bytes, config.root)


def _builtin(config: SourceConfig, path: str) -> Origin:
    name = path.removeprefix(_BUILTIN)
    if name not in corpora():
        known = [f"{_BUILTIN}{name}" for name in corpora()]
        nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]
        raise UsageError(f"no built-in source {path}; nearest: {nearest}")
    if config.split not in SPLITS:
        raise UsageError(f"{path} has no split {config.split!r}; it has {', '.join(sorted(SPLITS))}")
    if config.kinds:
        raise UsageError(f"{path} says itself which of its fields are images or sounds: leave `kinds` out")
    corpus = corpora()[name]

    def rows() -> Iterator[Row]:
        return (Row(number, fields) for number, fields in enumerate(corpus.rows(config.split), start=1))

    stamp = corpus.stamp()
    layout = Layout("pairs", corpus.fields)
    reading = Reading([RowsPart(path, rows)], _want(config, layout), layout.name)
    key = f"{path} {sys.version}"
    return Origin(f"{name}-{config.split}", key, lambda: stamp, lambda: reading, lambda: corpus.fields.named)


def _function(config: SourceConfig, path: str) -> Origin:
    """A user's generator. What it reads isn't known, so it runs every time and its rows tell what changed."""
    function = import_object(path, f"source {path}")
    parameters = inspect.signature(function).parameters
    if "split" not in parameters and config.split != "train":
        raise UsageError(f"source {path} takes no argument `split`, but split is {config.split!r}")
    keywords = {"split": config.split} if "split" in parameters else {}

    def rows() -> Iterator[Row | Malformed]:
        return (as_row(number, fields) for number, fields in enumerate(function(**keywords), start=1))

    reading = Reading([RowsPart(path, rows)], _want(config, _PLAIN), "pairs")
    return Origin(f"{path}-{config.split}", path, None, lambda: reading)


def _of_hub(config: SourceConfig, path: str) -> Origin:
    dataset = hub.load(path, config.split)

    def reading() -> Reading:
        layout = _layout(config, lambda: dataset.column_names)
        want = _want(config, layout, hub.media_of(dataset))
        return Reading([hub.HubPart(path, dataset._fingerprint, dataset)], want, layout.name)

    name = path.removeprefix(hub.PREFIX).replace("/", "-")
    return Origin(f"{name}-{config.split}", path, lambda: dataset._fingerprint, reading, lambda: dataset.column_names)


# Files.


def _of_files(config: SourceConfig) -> Origin:
    paths = [config.path] if isinstance(config.path, str) else config.path

    def listed() -> tuple[Found, list[File], list[File]]:
        """(what is there, the files of the split, those of the corpus)."""
        found = _found(paths)
        return found, _chosen(config, found), find(config.corpus).files if config.corpus else []

    found, files, corpus = listed()

    def stamp() -> Any:
        _, files, corpus = listed()
        return {"files": stamp_of(files), "corpus": stamp_of(corpus)}

    name = _name(found, len(paths))
    key = json.dumps([p if is_remote(p) else str(Path(p).expanduser().absolute()) for p in paths])
    return Origin(
        f"{name}-{config.split}" if found.folder else name,
        key,
        stamp,
        lambda: _reading(config, found, files, corpus),
        lambda: _present(files, config.max_bytes),
    )


def _found(paths: Sequence[str]) -> Found:
    if len(paths) == 1:
        return find(paths[0])
    every = [find(path) for path in paths]
    folder = next((path for path, found in zip(paths, every, strict=True) if found.folder), None)
    if folder is not None:
        raise UsageError(f"source {folder} is a folder in a list of files: make it a source of its own, or a glob")
    root = posixpath.commonpath([found.root for found in every])
    files = [file._replace(name=posixpath.relpath(file.uri, root)) for found in every for file in found.files]
    return Found(root, files, False)


def _name(found: Found, paths: int) -> str:
    """What the source goes by: its folder or its file, without suffixes."""
    if found.folder or len(found.files) > 1:
        stem = posixpath.basename(found.root).split(".")[0] or posixpath.basename(found.root)
        return stem or "files"
    stem = posixpath.basename(found.files[0].uri)
    return stem.split(".")[0] or stem


def _chosen(config: SourceConfig, found: Found) -> list[File]:
    """The files of a split; of a folder whose files belong together, all that are read."""
    if not found.folder:
        wrong = next((file for file in found.files if file.suffix not in SUFFIXES), None)
        if wrong is not None:
            raise UsageError(f"source {wrong.uri} is none of {', '.join(SUFFIXES)} (.gz, .zst), nor a folder of them")
        if config.split != "train":
            what = "a single file" if len(found.files) == 1 else "a list of files"
            raise UsageError(f"source {config.shown} is {what} and has no split {config.split!r}; leave `split` out")
        return found.files
    if hub.is_saved(found):
        return hub.saved_files(config.shown, found, config.split)
    if _is_beir(config, found):
        corpus, queries, qrels = _beir_files(config, found)
        return [*corpus, *queries, qrels]
    return _split_files(config, found)


def _split_files(config: SourceConfig, found: Found) -> list[File]:
    """The files of a split, sorted. A folder that names no splits is one split, called train."""
    files = [file for file in found.files if file.suffix in FOLDER_SUFFIXES]
    if not files:
        raise UsageError(f"source {config.shown} is a folder without {', '.join(FOLDER_SUFFIXES)} files")

    def belongs(file: File, split: str) -> bool:
        *folders, name = file.name.split("/")
        return split in folders or re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", name) is not None

    of_split = [file for file in files if belongs(file, config.split)]
    if of_split:
        return of_split
    present = [split for split in _SPLITS if any(belongs(file, split) for file in files)]
    if present or config.split != "train":
        has = f"it has {', '.join(present)}" if present else "its files name no splits; leave `split` out"
        raise UsageError(f"source {config.shown} has no split {config.split!r}; {has}")
    return files


def _reading(config: SourceConfig, found: Found, files: list[File], corpus: list[File]) -> Reading:
    if found.folder and _is_beir(config, found):
        want = Want(config.fields(BEIR_FIELDS), config.max_bytes)
        return Reading(beir_parts(*_beir_files(config, found)), want, "beir")
    layout = _layout(config, lambda: _present(files, config.max_bytes))
    want, parts = _want(config, layout, _recognised(config, layout, files)), parts_of(files)
    if (corpus or layout.id_fields) and want.fields.kinds != TEXT:
        raise UsageError(f"source {config.shown} names documents of a corpus by id: they are texts, leave `kinds` out")
    if corpus:
        ids = layout.id_fields or (want.fields.positive, *want.fields.negatives)
        return Reading([CorpusPart(part, tuple(corpus), ids) for part in parts], want, layout.name)
    if layout.id_fields:
        raise UsageError(
            f"source {config.shown} names its documents by id ({layout.id_fields[0]}): set `corpus` to the file that "
            "has them"
        )
    return Reading(parts or [], want, layout.name)


def _recognised(config: SourceConfig, layout: Layout, files: Sequence[File]) -> dict[str, Kind]:
    """The fields of both sides that hold images or sounds in the first file with rows."""
    fields = config.fields(layout.fields)
    first = next((file for file in files if file.size), None)
    sides = (*fields.of_query, *fields.of_positive, *fields.negatives)
    return media_of(first, sides, config.max_bytes) if first is not None and not config.kinds else {}


def _present(files: Iterable[File], max_bytes: int) -> list[str]:
    """The fields of the first file that has any."""
    return next((fields for file in files if (fields := fields_of(file, max_bytes))), [])


def _layout(config: SourceConfig, present: Callable[[], Sequence[str]]) -> Layout:
    """As the recipe names the fields, else as they are recognised."""
    named = (config.query, config.positive, config.query_parts, config.positive_parts)
    if config.format is None and any(field is not None for field in named):
        return _PLAIN
    there = present()
    return layout_of(there, config.format, config.shown) if there else _PLAIN


# BEIR folders.


def _is_beir(config: SourceConfig, found: Found) -> bool:
    names = {file.name for file in found.files}
    if config.format not in (None, "beir"):
        return False
    whole = (
        bool(_named(found, "corpus")) and bool(_named(found, "queries")) and any(n.startswith("qrels/") for n in names)
    )
    if config.format == "beir" and not whole:
        raise UsageError(f"source {config.shown} is no BEIR folder: it lacks corpus.jsonl, queries.jsonl or qrels/")
    return whole


def _named(found: Found, stem: str) -> tuple[File, ...]:
    return tuple(file for file in found.files if re.fullmatch(rf"{stem}\.(jsonl|parquet)(\.gz|\.zst)?", file.name))


def _beir_files(config: SourceConfig, found: Found) -> tuple[tuple[File, ...], tuple[File, ...], File]:
    """(corpus, queries, qrels of the split)."""
    qrels = {file.name.removeprefix("qrels/").split(".tsv")[0]: file for file in found.files if file.suffix == ".tsv"}
    if config.split not in qrels:
        raise UsageError(f"source {config.shown} has no split {config.split!r}; it has {', '.join(sorted(qrels))}")
    return _named(found, "corpus"), _named(found, "queries"), qrels[config.split]
