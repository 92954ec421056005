"""The files of a source, on this machine or in an object store (s3://, gs://), through pyarrow's file systems."""

from __future__ import annotations

import contextlib
import difflib
import errno
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from data_services.schema import RunError, UsageError

_REMOTE = re.compile(r"(s3|gs|gcs)://")
_WILD = re.compile(r"[*?\[]")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class File(NamedTuple):
    """One file. `uri` opens it from any node; `name` is how messages and the quarantine call it."""

    uri: str
    name: str
    size: int
    mtime_ns: int

    @property
    def suffix(self) -> str:
        """Of the format, without that of a compression: `.jsonl` of pairs.jsonl.gz."""
        return posixpath.splitext(self.uri.removesuffix(self._packed))[1].lower()

    @property
    def compression(self) -> str | None:
        return _COMPRESSIONS.get(self._packed)

    @property
    def _packed(self) -> str:
        return next((end for end in _COMPRESSIONS if self.uri.endswith(end)), "")

    def open(self) -> pa.NativeFile:
        """Its bytes as they stand, seekable."""
        system, path = _system(self.uri)
        return system.open_input_file(path)

    def stream(self) -> pa.NativeFile:
        """Its bytes from the beginning, unpacked."""
        system, path = _system(self.uri)
        return system.open_input_stream(path, compression=self.compression)


def read_bytes(uri: str, most: int) -> bytes:
    """The first bytes of a file, `most` of them at most. Raises what the file system raises."""
    if not is_remote(uri):
        with open(uri, "rb") as file:
            return file.read(most)
    system, place = _system(uri)
    with system.open_input_stream(place) as stream:
        return stream.read(most)


def is_remote(path: str) -> bool:
    return _REMOTE.match(path) is not None


class Found(NamedTuple):
    """What a path names: `root` is the folder (or the file's folder), `files` all below it, sorted by name."""

    root: str
    files: list[File]
    folder: bool


def find(path: str) -> Found:
    """The file at a path, the files that a glob matches, or all files of a folder.

    Hidden files, and those whose name or folder begins with `_`, are left out of globs and folders. Raises
    UsageError where nothing is there, RunError where an object store doesn't answer.
    """
    uri = path if is_remote(path) else str(Path(path).expanduser().absolute())
    with _answering(path):
        if _WILD.search(uri):
            return _glob(path, uri)
        system, place = _system(uri)
        info = system.get_file_info(place)
        if info.type == fs.FileType.File:
            return Found(posixpath.dirname(uri), [_file(uri, posixpath.basename(uri), info)], False)
        if info.type == fs.FileType.NotFound:
            raise UsageError(f"source {path} does not exist{_nearest(uri)}")
        return Found(uri, _below(uri), True)


def _below(root: str) -> list[File]:
    """Every file under a folder but the hidden ones."""
    system, place = _system(root)
    found = system.get_file_info(fs.FileSelector(place, recursive=True))
    files = []
    for info in found:
        name = posixpath.relpath(info.path, place)
        if info.type == fs.FileType.File and not any(part.startswith((".", "_")) for part in name.split("/")):
            files.append(_file(posixpath.join(root, name), name, info))
    return sorted(files, key=lambda file: file.name)


def _glob(path: str, uri: str) -> Found:
    base = posixpath.dirname(uri[: _WILD.search(uri).start()])  # type: ignore[union-attr]
    system, place = _system(base)
    if system.get_file_info(place).type == fs.FileType.NotFound:
        raise UsageError(f"source {path} does not exist{_nearest(base)}")
    wanted = re.compile(_pattern(posixpath.relpath(uri, base)))
    files = [file for file in _below(base) if wanted.fullmatch(file.name)]
    if not files:
        raise UsageError(f"source {path} matches no file")
    return Found(base, files, False)


def _pattern(glob: str) -> str:
    """A glob as a regular expression: * and ? stay inside a folder, ** crosses folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p)) for p in parts)


def _file(uri: str, name: str, info: fs.FileInfo) -> File:
    return File(uri, name, info.size, info.mtime_ns or 0)


def _system(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path, and the path as it names it."""
    if not is_remote(uri):
        return fs.LocalFileSystem(), uri
    return fs.FileSystem.from_uri(uri.replace("gcs://", "gs://", 1))


def _nearest(uri: str) -> str:
    if is_remote(uri):
        return ""
    path = Path(uri)
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; beside it is {near[0]}" if near else ""


@contextlib.contextmanager
def _answering(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"source {path} can't be listed: {_first_line(error)}") from error


@contextlib.contextmanager
def reading(file: File) -> Iterator[None]:
    """Turns what goes wrong while a file is read into one sentence that names it.

    UsageError where its bytes are wrong or it is gone, RunError where the disk or the object store fails.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UsageError(f"source file {file.uri} was there and is gone: bring it back, and start again") from error
    except pa.ArrowInvalid as error:
        raise UsageError(_broken(file, error)) from error
    except OSError as error:
        if error.errno is None or (file.compression and error.errno != errno.ENOSPC):
            raise UsageError(_broken(file, error)) from error
        raise RunError(f"source file {file.uri} can't be read: {_first_line(error)}") from error


def _broken(file: File, error: Exception) -> str:
    kind = {".parquet": "Parquet", ".tar": "tar"}.get(file.suffix, "Arrow")
    if file.compression:
        kind = "gzip" if file.compression == "gzip" else "zstd"
    return f"source file {file.uri} is not a whole {kind} file: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def stamp_of(files: Sequence[File]) -> list[list[Any]]:
    """What tells that a file changed: names, sizes, times."""
    return [[file.name, file.size, file.mtime_ns] for file in files]
