"""What the commands share: options and arguments, and how a result is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result to FILE, for machines.")]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a run, models:/NAME@ALIAS, models:/NAME/VERSION, or a hub id."),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.path=value …]", help="Keys of the recipe to set.")]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, recipes/quickstart.yaml say.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, for the result.")]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="A source, as a recipe's data.sources name it.")]
SourceKeys = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value …]", help="Keys of the source: split, query, positive, negatives …"),
]


def open_console() -> Console:
    from rich.console import Console

    return Console()


def check_json(file: Path | None, option: str = "--json") -> None:
    """Before the work, not after it: whether the result can be written."""
    from data_services.schema import UsageError

    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"{option} {file}: {'this is a folder' if file.is_dir() else 'no such folder'}; name a file")


def write_json(file: Path | None, result: Any) -> None:
    if file is None:
        return
    making = file.with_name(file.name + ".making")
    making.write_text(json.dumps(result, indent=2, default=str) + "\n")
    making.replace(file)
