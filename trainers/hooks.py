"""What a loop tells the world: metrics by step in a file, a request to stop. Each has a fake in the tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from data_services.schema import RunError


class MetricsSink(Protocol):
    """Receives the metrics of each step, in order, on rank 0."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None: ...


class MetricsLog:
    """One JSON line a step in `path`, null for what isn't finite. Opening it at `start` cuts off the steps that will
    be replayed."""

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with open(path, "r+b") as file:
            file.truncate(first_line_at(file, start))
        self._path = path
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  held for the whole run

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **finite_or_null(metrics)}) + "\n")
        except OSError as error:
            raise RunError(
                f"the metrics of step {step} could not be written: {error.strerror}: {self._path}"
            ) from error


def finite_or_null(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no other numbers."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def first_line_at(file: BinaryIO, step: int) -> int:
    """Byte offset of the first line whose step is `step` or later, by bisection: lines are ordered by step.

    A line cut short by a kill counts as later than every step.
    """
    low, high = 0, file.seek(0, 2)  # the answer is the start of a line in [low, high]
    while low < high:
        file.seek(middle := (low + high) // 2)
        if middle > low:
            file.readline()  # to the start of the next line
        begin = file.tell()
        line = file.readline() if begin < high else b""
        if not line:  # no line starts in (middle, high): look from the front of what is left
            file.seek(low)
            begin, line = low, file.readline()
        if _step_of(line) < step:
            low = begin + len(line)
        elif begin > low:
            high = begin
        else:
            return low
    return low


def _step_of(line: bytes) -> int:
    if not line.endswith(b"\n"):
        return 1 << 62
    return json.loads(line)["step"]


class StopFile:
    """A request to checkpoint and stop, made by creating a file in the run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> bool:
        return self.path.exists()
