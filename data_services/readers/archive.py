"""WebDataset tar files: members `KEY.EXTENSION`, those of one sample next to each other.

A .json member's fields become fields of the row, a .txt member the field `txt`, and the key the field `__key__`. Where
images or sounds are wanted, such members are fields of bytes, by their extension (`jpg`) and the first of a sample also
by its kind (`image`, `audio`), for archives that mix extensions. Other members are passed over.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from data_services.files import File, reading
from data_services.items import Kind
from data_services.readers.blocks import Block, Want, blocks_of_rows
from data_services.records import Malformed, Row
from data_services.schema import UsageError

KEY = "__key__"


def _json(data: bytes, extension: str) -> dict[str, Any]:
    value = json.loads(data.decode())
    return value if isinstance(value, dict) else {extension: value}


def _text(data: bytes, extension: str) -> dict[str, Any]:
    return {extension: data.decode()}


_DECODERS: dict[str, Callable[[bytes, str], dict[str, Any]]] = {
    "json": _json,
    "txt": _text,
    "text": _text,
    "cls": _text,
}
_MEDIA: dict[str, Kind] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff", "ppm", "jp2", "avif"), "image"),
    **dict.fromkeys(("wav", "flac", "ogg", "mp3"), "audio"),
}


def blocks(file: File, want: Want) -> Iterator[Block]:
    """The samples of an archive, numbered from 1."""
    names = {name for name, _ in want.fields.media}
    samples = _samples(file, want.max_bytes, lambda extension: extension in names or _kind_of(extension) in names)
    yield from blocks_of_rows(file.name, samples, want.block_rows)


def sampled(file: File, max_bytes: int) -> Mapping[str, Any]:
    """The first sample, its images and sounds among the fields."""
    rows = (
        row for row in _samples(file, max_bytes, lambda extension: _kind_of(extension) != "") if isinstance(row, Row)
    )
    return next(rows, Row(0, {})).fields


def _samples(file: File, max_bytes: int, media: Callable[[str], bool]) -> Iterator[Row | Malformed]:
    """media: whether a member of an extension is read that is no text"""
    with reading(file):
        try:
            with tarfile.open(fileobj=file.stream(), mode="r|") as archive:
                members = (_part(file, archive, member, max_bytes, media) for member in archive if member.isreg())
                for number, (key, parts) in enumerate(groupby(members, key=lambda part: part[0]), start=1):
                    yield _sample(number, key, [(extension, data) for _, extension, data in parts])
        except tarfile.TarError as error:
            raise UsageError(f"source file {file.uri} is not a whole tar file: {error}") from error


def _part(
    file: File, archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int, media: Callable[[str], bool]
) -> tuple[str, str, bytes | str | None]:
    """(key, extension, bytes or why there are none) of a member; None of one that is passed over."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(f"source file {file.uri} has a member outside of it, {member.name!r}: don't trust it")
    stem, _, extension = path.name.partition(".")
    extension = extension.lower()
    key = (path.parent / stem).as_posix()
    if extension not in _DECODERS and not media(extension):
        return key, extension, None
    if member.size > max_bytes:
        return key, extension, f"its member .{extension} has more than max_bytes={max_bytes} bytes"
    opened = archive.extractfile(member)
    assert opened is not None, member.name
    return key, extension, opened.read()


def _kind_of(extension: str) -> Kind:
    """Of a member, by the last part of its extension: `left.jpg` is an image. "" of what is no sound either."""
    return _MEDIA.get(extension.rpartition(".")[2], "")


def _sample(number: int, key: str, parts: list[tuple[str, bytes | str | None]]) -> Row | Malformed:
    fields: dict[str, Any] = {KEY: key}
    for extension, data in parts:
        if isinstance(data, str):
            return Malformed(number, data, key)
        if extension not in _DECODERS:
            fields |= {extension: data} if data is not None else {}
            if data is not None and (kind := _kind_of(extension)):
                fields.setdefault(kind, data)
            continue
        assert data is not None, extension
        try:
            fields |= _DECODERS[extension](data, extension)
        except UnicodeDecodeError:
            return Malformed(number, f"its member .{extension} is not UTF-8", key)
        except (json.JSONDecodeError, RecursionError):
            return Malformed(number, f"its member .{extension} is not JSON", key)
    return Row(number, fields)
