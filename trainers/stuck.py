"""Where a worker stands that doesn't get on: a step that takes too long leaves the stacks of its threads behind.

The interpreter's own watchdog writes them (`faulthandler`), a thread in C: it needs no lock that a stuck worker holds.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path
from types import TracebackType

# The stacks are written before the collectives' own time-out ends the workers.
SHARE_OF_TIMEOUT = 0.9


class StuckWatch:
    """Appends every thread's stack of this process to `path` once `beat` hasn't been called for long.

    timeout_s  after which a collective gives up; the stacks are written at SHARE_OF_TIMEOUT of it

    One a process: the interpreter has one watchdog. A file that stayed empty is removed at the end.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._patience_s = path, SHARE_OF_TIMEOUT * timeout_s
        self._file = open(path, "a")  # noqa: SIM115  its descriptor is the watchdog's

    def __enter__(self) -> StuckWatch:
        self.beat()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.exists() and not self._path.stat().st_size:
            self._path.unlink(missing_ok=True)

    def beat(self) -> None:
        """This worker gets on."""
        faulthandler.dump_traceback_later(self._patience_s, file=self._file)


def take_stacks(folder: Path) -> str:
    """The stacks that stuck workers have left in `folder`, worker by worker; empty where none has. They are removed."""
    told = []
    for path in sorted(folder.glob("*.txt")) if folder.is_dir() else []:
        if text := path.read_text():
            told.append(f"{path.stem} was stuck:\n{text}")
            path.unlink(missing_ok=True)
    return "\n".join(told)
