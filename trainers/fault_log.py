"""The faults that a run has met, a line each; read without importing what trains."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_services.schema import RunError


class FaultLog:
    """One JSON line a fault in `path`. What a resume meets again is in it already, and not written twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = {(fault["kind"], fault["step"]) for fault in read_faults(path)}

    def __call__(self, fault: Mapping[str, Any]) -> None:
        key = fault["kind"], fault["step"]
        if key in self._known:
            return
        self._known.add(key)
        try:
            whole = self._path.read_bytes().rfind(b"\n") + 1 if self._path.exists() else 0
            with open(self._path, "a") as file:
                file.truncate(whole)  # a line cut short by a kill
                file.write(json.dumps({**fault, "at": time.time()}) + "\n")
        except OSError as error:
            raise RunError(f"a fault could not be written: {error.strerror}: {self._path}") from error


def read_faults(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a fault log, none where there is no such file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]
