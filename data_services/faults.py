"""What reading does about faults: those that pass are waited for, rows that are broken for good are put aside."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from data_services.schema import RunError

log = logging.getLogger(__name__)
T = TypeVar("T")

WAITS_S = (0.5, 2.0, 8.0)  # before each further try
FOR_GOOD = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def patiently(
    read: Callable[[], T], what: str, waits_s: Sequence[float] = WAITS_S, sleep: Callable[[float], None] = time.sleep
) -> T:
    """What `read` returns; tried again after each wait where it raises OSError, as a network or its storage may.

    Raises RunError, naming `what` was read, where the last try fails too, or at once for a file that isn't there.
    """
    for tries, wait in enumerate([*waits_s, None], start=1):
        try:
            return read()
        except OSError as error:
            if wait is None or isinstance(error, FOR_GOOD):
                times = f"after {tries} tries" if tries > 1 else "and won't be helped by another try"
                raise RunError(f"{what} can't be read, {times}: {' '.join(str(error).split())}") from error
            log.warning("%s can't be read (%s); trying again in %g s", what, error, wait)
            sleep(wait)
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class BadRow:
    """A row that a batch does without.

    source, row, id  where it stands in the plan's sources, and its id there
    step             the batch that missed it first
    reason           why it can't be decoded
    """

    source: str
    row: int
    id: str
    step: int
    reason: str


@dataclass(frozen=True)
class BadRows:
    """Rows that couldn't be decoded, a JSON file each in a folder that every machine of the run sees.

    One name a row: a task that is done over, or another epoch, doesn't count it twice. folder None: only the log tells.
    """

    folder: Path | None = None

    def add(self, bad: BadRow) -> None:
        log.warning("source %s, row %d (%s) is left out: %s", bad.source, bad.row, bad.id, bad.reason)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', bad.source)}-{bad.row}.json"
        if not file.exists():
            making = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
            making.write_text(json.dumps(asdict(bad), indent=1) + "\n")
            os.replace(making, file)

    def read(self) -> list[BadRow]:
        """All of them, by source and row."""
        files = sorted(self.folder.glob("*.json")) if self.folder is not None else []
        return sorted((BadRow(**json.loads(f.read_text())) for f in files), key=lambda bad: (bad.source, bad.row))
