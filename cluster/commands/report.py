"""`gyre report`: a thin call of `cluster.reports`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Json, check_json, open_console, write_json


def report(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A run, search, evaluation or comparison: its id, the beginning of a run's or search's, or its folder "
            "or file.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes; none: beside what it is of.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Write one self-contained HTML page of a run, a search, an evaluation or a comparison."""
    from cluster.console import show_lines
    from cluster.reports.report import report as make

    check_json(json_file)
    made = make(what, out)
    write_json(json_file, made.as_dict())
    show_lines(open_console(), f"{made.kind} {made.id}", made.path)
