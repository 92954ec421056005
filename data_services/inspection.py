"""What a source is before and after its conversion: its layout, fields, first records, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_services.items import Kinds
from data_services.media.checks import readable
from data_services.origins import origin_of
from data_services.readers.blocks import Want
from data_services.records import Malformed, Record, Row, record
from data_services.sources import SourceConfig, convert_source, slot_of
from data_services.store import Reading, Report, StoredSource, stored_already

_LOOKED_AT_ROWS = 1_000


@dataclass(frozen=True)
class Inspection:
    """A source as its first rows show it.

    layout     that was named or recognised (`layouts`)
    fields     parts of a record, each with the field that holds it
    present    all fields of the first rows
    examples   the first records
    malformed  the first malformed rows: file and number, reason
    rows       of the conversion, if there is one: good, malformed
    """

    source: str
    layout: str
    fields: dict[str, Any]
    present: list[str]
    examples: list[dict[str, Any]]
    malformed: list[str]
    rows: int | None
    quarantined: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_source(config: SourceConfig, home: Path, examples: int = 3) -> Inspection:
    """Reads the first rows of a source, and converts nothing. Errors as of `open_source`."""
    origin = origin_of(config, home)
    reading = origin.reading()
    good: list[dict[str, Any]] = []
    malformed: list[str] = []
    for name, result in _first(reading):
        if isinstance(result, Record):
            good.append(_readable(result, reading.want.fields.kinds))
        else:
            malformed.append(f"{name}:{result.number}: {result.reason}")
        if len(good) == examples:
            break
    known = stored_already(origin.name, slot_of(origin.name, origin.key, config, home), origin.stamp and origin.stamp())
    return Inspection(
        source=origin.name,
        layout=reading.layout,
        fields={key: value for key, value in reading.want.fields._asdict().items() if value},
        present=list(origin.present()),
        examples=good,
        malformed=malformed[:examples],
        rows=known.rows if known else None,
        quarantined=sum(known.quarantined.values()) if known else None,
    )


def _readable(made: Record, kinds: Kinds) -> dict[str, Any]:
    """What a record has, with words in the place of bytes."""
    shown = {
        "query": readable(made.query, kinds.query),
        "positives": [readable(item, kinds.document) for item in made.positives],
        "negatives": [readable(item, kinds.document) for item in made.negatives],
    }
    return {key: value for key, value in (made._asdict() | shown).items() if value not in (None, [])}


def _first(reading: Reading) -> Iterator[tuple[str, Record | Malformed]]:
    want: Want = reading.want
    seen = 0
    for part in reading.parts:
        for block in part.blocks(want):
            for row in block.rows():
                yield block.name, record(row, want.fields, want.max_bytes) if isinstance(row, Row) else row
                seen += 1
                if seen == _LOOKED_AT_ROWS:
                    return


@dataclass(frozen=True)
class Conversion:
    """A converted source: where it is, and its rows, in = out + quarantined."""

    source: str
    layout: str
    folder: Path
    rows_in: int
    rows_out: int
    row_groups: int
    fingerprint: str
    quarantined: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def convert(config: SourceConfig, home: Path, report: Report | None = None) -> Conversion:
    """Converts a source, unless that was done. Errors as of `open_source`, but for the share of malformed rows."""
    stored = convert_source(config, home, report)
    malformed = sum(stored.quarantined.values())
    return Conversion(
        stored.name,
        stored.layout,
        stored.folder,
        stored.rows + malformed,
        stored.rows,
        len(stored.row_groups),
        stored.fingerprint,
        stored.quarantined,
    )


@dataclass(frozen=True)
class Validation:
    """Whether few enough rows of a source are malformed. reasons: for each its rows and the first of them."""

    source: str
    rows_in: int
    rows_out: int
    share: float
    allowed: float
    reasons: dict[str, tuple[int, str]]
    quarantine: Path

    @property
    def passed(self) -> bool:
        return self.share <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"quarantine": str(self.quarantine), "passed": self.passed}


def validate(config: SourceConfig, home: Path, report: Report | None = None) -> Validation:
    """Reads every row of a source, by converting it. Errors as of `open_source`, but for the share."""
    stored = convert_source(config, home, report)
    malformed = sum(stored.quarantined.values())
    first = _first_of_each(stored)
    counts = sorted(stored.quarantined.items(), key=lambda item: -item[1])
    return Validation(
        stored.name,
        stored.rows + malformed,
        stored.rows,
        malformed / (stored.rows + malformed),
        config.quarantine_share,
        {reason: (count, first[reason]) for reason, count in counts},
        stored.folder / "quarantine.parquet",
    )


def _first_of_each(stored: StoredSource) -> dict[str, str]:
    """Where the first row of each reason stands."""
    first: dict[str, str] = {}
    for batch in pq.ParquetFile(stored.folder / "quarantine.parquet").iter_batches(columns=["origin", "reason"]):
        for row in batch.to_pylist():
            first.setdefault(row["reason"], row["origin"])
    return first
