"""What a person sees of a source: parts as they are converted, its fields and records, what was left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from cluster.console import show_lines, show_table

if TYPE_CHECKING:
    from data_services.inspection import Conversion, Inspection, Validation

_SHOWN_CHARACTERS, _SHOWN_TEXTS = 100, 3


def show_inspection(console: Console, found: Inspection, source: str) -> None:
    show_lines(console, f"source {found.source}, read as {found.layout}")
    if found.present:
        show_lines(console, f"fields {', '.join(found.present)}")
    named = [[part, _cell(field)] for part, field in found.fields.items()]
    show_table(console, ("part of a record", "field"), named)
    for number, example in enumerate(found.examples, start=1):
        show_lines(console, f"record {number}")
        for part, value in example.items():
            texts = value if isinstance(value, list) else [value]
            show_lines(console, *(f"  {part:15} {_short(text)}" for text in texts[:_SHOWN_TEXTS]))
            if len(texts) > _SHOWN_TEXTS:
                show_lines(console, f"  {'':15} and {len(texts) - _SHOWN_TEXTS} more")
    for malformed in found.malformed:
        show_lines(console, f"malformed  {malformed}")
    if found.rows is None:
        show_lines(console, "", f"count and check every row: gyre data validate {source}")
    else:
        show_lines(console, "", f"converted: {found.rows:,} rows, {found.quarantined:,} quarantined")


def show_conversion(console: Console, done: Conversion, source: str) -> None:
    quarantined = sum(done.quarantined.values())
    show_lines(
        console,
        f"source {done.source}, read as {done.layout}",
        f"rows in   {done.rows_in:,} = {done.rows_out:,} out + {quarantined:,} quarantined",
        f"stored in {done.folder} ({done.row_groups:,} row groups)",
        *([f"what was left out: gyre data validate {source}"] if quarantined else []),
    )


def show_validation(console: Console, found: Validation) -> None:
    rows = [[f"{count:,}", escape(reason), escape(first)] for reason, (count, first) in found.reasons.items()]
    if rows:
        show_table(console, ("rows", "reason", "first"), rows)
    quarantined = found.rows_in - found.rows_out
    show_lines(
        console,
        f"rows in {found.rows_in:,} = {found.rows_out:,} out + {quarantined:,} quarantined",
        f"{'passed' if found.passed else 'failed'}: {found.share:.2%} malformed, quarantine_share allows "
        f"{found.allowed:.2%}",
        *([f"malformed rows stand in {found.quarantine}"] if quarantined else []),
    )


def _cell(field: object) -> str:
    return escape(", ".join(field) if isinstance(field, tuple) else str(field))


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
