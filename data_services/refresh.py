"""Hard negatives that are mined again while training goes on (ANCE, Xiong et al. 2021, arXiv 2007.00808, section 4).

What is mined after step s is read from step s + delay on, never earlier and never later: the batches stay a function of
the step, whatever the time that mining took. A mined source has the rows, row groups and ids of the one it is made
from, so the plan's rows are the same; only their negatives are others.

    FOLDER/step-S/model/       the weights after step S, as an exported model
    FOLDER/step-S/SOURCE/      Parquet files of each source, in the order of the recipe: 0, 1, …
    FOLDER/step-S/mined.json   written last: fingerprints. A step without it isn't mined yet
    FOLDER/step-S/failed.txt   why it won't be
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from data_services.assemble import GlobalBatch
from data_services.mining.filters import FilterConfig
from data_services.mining.search import SearchConfig
from data_services.schema import RunError, Section
from data_services.store import StoredSource

if TYPE_CHECKING:
    from data_services.order import Plan
    from data_services.stream import BatchReader

MINED, FAILED = "mined.json", "failed.txt"
_LOOK_EVERY_S = 0.2


class RefreshConfig(Section):
    """`mine:` hard negatives mined again while training goes on, with the momentum encoder where the run keeps one."""

    every_steps: int | None = Field(None, ge=1, description="mine after every so many steps; null: never")
    delay_steps: int = Field(
        100, ge=1, description="steps until what was mined is read; training waits where it isn't there by then"
    )
    filters: FilterConfig = Field(FilterConfig(), description="which documents are negatives")
    search: SearchConfig = Field(SearchConfig(), description="how the nearest ones are found")

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after `step` steps are mined with: some batch of the run has to read the result."""
        return self.every_steps is not None and step % self.every_steps == 0 and step + self.delay_steps < steps

    def read_at(self, t: int) -> int | None:
        """After which step was mined what batch t reads; None: the sources as they are."""
        if self.every_steps is None:
            return None
        step = (t - self.delay_steps) // self.every_steps * self.every_steps
        return step if step > 0 else None


def step_folder(folder: Path, step: int) -> Path:
    """Where what is mined after `step` lies."""
    return folder / f"step-{step}"


@dataclass(frozen=True)
class RefreshedReader:
    """A `BatchReader` whose sources are mined again as `config` says; it waits for what isn't mined yet.

    folder  of the run, seen by every reader
    """

    reader: BatchReader
    config: RefreshConfig
    folder: Path

    @property
    def plan(self) -> Plan:
        return self.reader.plan

    def __call__(self, t: int) -> GlobalBatch:
        step = self.config.read_at(t)
        if step is None:
            return self.reader(t)
        sources = wait_for(step_folder(self.folder, step), self.reader.sources)  # type: ignore[arg-type]
        return replace(self.reader, sources=sources)(t)


def wait_for(folder: Path, sources: Sequence[StoredSource]) -> tuple[StoredSource, ...]:
    """The mined sources, as soon as they are there. RunError where mining failed, or was of other sources."""
    while not (folder / MINED).exists():
        if (folder / FAILED).exists():
            raise RunError(f"mining failed ({folder}): {(folder / FAILED).read_text()}")
        time.sleep(_LOOK_EVERY_S)
    told = json.loads((folder / MINED).read_text())
    if told["of"] != [source.fingerprint for source in sources]:
        raise RunError(f"{folder} was mined of other sources; start a new run")
    made = enumerate(zip(sources, told["fingerprints"], strict=True))
    return tuple(mined_source(source, folder / str(number), fingerprint) for number, (source, fingerprint) in made)


def mined_source(source: StoredSource, folder: Path, fingerprint: str) -> StoredSource:
    """The source with the files that `mine.write_source` wrote to the folder: the same row groups."""
    names = tuple(f"part-{number:05}.parquet" for number in range(len(source.names)))
    return replace(source, folder=folder, names=names, fingerprint=fingerprint)
