"""Images and sounds that rows name by path, read from the folder of the file that names them, or below `root`."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

from data_services.files import is_remote, read_bytes
from data_services.media.checks import MEDIA_KINDS
from data_services.readers.blocks import MEDIA_BLOCK_ROWS, Block, Want
from data_services.records import Malformed, Row, shown
from data_services.schema import RunError

# What opening says of a path that names no file, among it a caption where a path should be.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class _Unreadable(ValueError):
    """Why a row's file isn't read."""


def with_files(blocks: Iterable[Block], want: Want, folder: str | None) -> Iterator[Block]:
    """The blocks, with the bytes of files where a field of images or sounds names one; as they are without such.

    folder: what the paths are relative to where `want.root` isn't; None: paths aren't read. Blocks become small: their
    rows are held with all their files.
    """
    root = want.root or folder
    for block in blocks:
        if not want.fields.media or root is None or not block.rows_in:
            yield block
            continue
        rows, left = iter(block.rows()), block.rows_in
        while some := list(islice(rows, MEDIA_BLOCK_ROWS)):
            left -= len(some)
            filled = partial(_filled, some, want, root)
            yield Block(block.name, len(some), None, filled, block.present, 0 if left else block.span)


def _filled(rows: Iterable[Row | Malformed], want: Want, root: str) -> Iterator[Row | Malformed]:
    for row in rows:
        if isinstance(row, Malformed):
            yield row
            continue
        try:
            files = {
                name: _read(row.fields[name], name, root, want.max_bytes)
                for name, kind in want.fields.media
                if kind in MEDIA_KINDS and name in row.fields
            }
            yield Row(row.number, {**row.fields, **files})
        except _Unreadable as why:
            yield Malformed(row.number, str(why), shown(row.fields))


def _read(value: Any, field: str, root: str, max_bytes: int) -> Any:
    """The bytes behind a path, or behind each of a list; what is no path as it is."""
    if isinstance(value, list):
        return [_read(its, field, root, max_bytes) for its in value]
    if isinstance(value, Mapping) and value.get("bytes") is None:
        value = value.get("path")
    if not isinstance(value, str):
        return value
    try:
        place = _below(root, value)
        if place is None:
            raise _Unreadable(f"field {field!r} names a file outside of the folder that its paths are relative to")
        data = read_bytes(place, max_bytes + 1)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise RunError(f"file {value} below {root} can't be read: {' '.join(str(error).split())}") from error
        raise _Unreadable(f"field {field!r} names a file that isn't there") from error
    if len(data) > max_bytes:
        raise _Unreadable(f"field {field!r} names a file of more than max_bytes={max_bytes} bytes")
    return data


def _below(root: str, path: str) -> str | None:
    """The place of a path; None where it isn't below `root`, through a link neither."""
    place = posixpath.normpath(path.replace("\0", "?"))  # no file's name has a NUL, and no call takes one
    if posixpath.isabs(place) or place.split("/")[0] == "..":
        return None
    if is_remote(root):
        return f"{root.rstrip('/')}/{place}"
    base = os.path.realpath(root)
    real = os.path.realpath(os.path.join(base, place))
    return real if os.path.commonpath([base, real]) == base else None
