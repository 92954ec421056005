"""A folder in an object store (s3://, gs://), through pyarrow: whole files in, whole files out.

An object appears whole or not at all in a store that keeps its word; one that lost bytes on the way is found by its
size, which is asked for after every upload. What fails is tried again, longer each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WAITS_S = (0.5, 2.0, 8.0)  # before each further try
BLOCK_BYTES = 8 << 20


class ObjectFolder:
    """uri: `s3://bucket/folder`. Every method raises OSError that names the object, once the last try failed."""

    def __init__(
        self, uri: str, waits_s: Sequence[float] = WAITS_S, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.uri, self._waits_s, self._sleep = uri.rstrip("/"), waits_s, sleep

    def __truediv__(self, name: str) -> ObjectFolder:
        return ObjectFolder(f"{self.uri}/{name}", self._waits_s, self._sleep)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectFolder, (self.uri, self._waits_s)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        from pyarrow import fs

        return fs.FileSystem.from_uri(self.uri)

    def put(self, file: Path, name: str) -> None:
        """Uploads a file as the object `name`."""

        def upload() -> None:
            system, root = self._place
            with open(file, "rb") as source, system.open_output_stream(f"{root}/{name}") as sink:
                sent = 0
                while block := source.read(BLOCK_BYTES):
                    sink.write(block)
                    sent += len(block)
            there = system.get_file_info(f"{root}/{name}").size
            if there != sent:
                with suppress(OSError):  # half an object is worse than none
                    system.delete_file(f"{root}/{name}")
                raise OSError(f"{there} of {sent} bytes arrived")

        self._patiently(upload, f"{self.uri}/{name} can't be written")

    def get(self, name: str, file: Path) -> None:
        """Downloads the object `name`; the file appears once it is whole."""

        def download() -> None:
            system, root = self._place
            file.parent.mkdir(parents=True, exist_ok=True)
            making = file.with_name(f".{file.name}.making")
            with system.open_input_stream(f"{root}/{name}") as source, open(making, "wb") as sink:
                while block := source.read(BLOCK_BYTES):
                    sink.write(block)
            making.replace(file)

        self._patiently(download, f"{self.uri}/{name} can't be read")

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of every object below, one listing whatever their number; {} where there is no such folder."""

        def listing() -> dict[str, int]:
            from pyarrow import fs

            system, root = self._place
            found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
            return {i.path.removeprefix(f"{root}/"): i.size for i in found if i.type == fs.FileType.File}

        return self._patiently(listing, f"{self.uri} can't be listed")

    def remove(self, name: str) -> None:
        """The object `name`, where it is there."""

        def delete() -> None:
            from pyarrow import fs

            system, root = self._place
            if system.get_file_info(f"{root}/{name}").type == fs.FileType.File:
                system.delete_file(f"{root}/{name}")

        self._patiently(delete, f"{self.uri}/{name} can't be removed")

    def _patiently(self, work: Callable[[], T], what: str) -> T:
        for wait in (*self._waits_s, None):
            try:
                return work()
            except OSError as error:
                if wait is None:
                    first = str(error).splitlines() or [type(error).__name__]
                    raise OSError(f"{what}, after {len(self._waits_s) + 1} tries: {first[0]}") from error
                self._sleep(wait)
        raise AssertionError("the last try returns or raises")
