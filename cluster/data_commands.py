"""`gyre data …`: thin calls of typed functions, as in `cluster.cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.options import Json, Source, SourceKeys, check_json, open_console, write_json

data_app = typer.Typer(help="Look at sources and at what training makes of them.", no_args_is_help=True)


@data_app.command(epilog="Example: gyre data inspect pairs.jsonl positive=answer")
def inspect(
    source: Source,
    keys: SourceKeys = None,
    *,
    examples: Annotated[int, typer.Option(min=1, help="How many records to show.")] = 3,
    json_file: Json = None,
) -> None:
    """Show the layout, the fields and the first records of a source; converts nothing."""
    from cluster.paths import home
    from cluster.sections import source_section
    from cluster.show_sources import show_inspection
    from data_services.inspection import inspect_source

    check_json(json_file)
    found = inspect_source(source_section(source, keys or []), home(), examples)
    write_json(json_file, found.as_dict())
    show_inspection(open_console(), found, source)


@data_app.command(epilog="Example: gyre data convert 's3://bucket/pairs/*.jsonl.zst' format=flagembedding")
def convert(source: Source, keys: SourceKeys = None, json_file: Json = None) -> None:
    """Convert a source to Parquet, as training would at its start; a killed conversion goes on."""
    from cluster.paths import home
    from cluster.sections import source_section
    from cluster.show_sources import PartsDone, show_conversion
    from data_services.inspection import convert as convert_source

    check_json(json_file)
    console = open_console()
    with PartsDone(console) as report:
        done = convert_source(source_section(source, keys or []), home(), report)
    write_json(json_file, done.as_dict())
    show_conversion(console, done, source)


@data_app.command(epilog="Example: gyre data validate pairs.jsonl quarantine_share=0.01 --json validation.json")
def validate(source: Source, keys: SourceKeys = None, json_file: Json = None) -> None:
    """Read every row and list what is malformed, by reason; exit 1 where it is more than quarantine_share."""
    from cluster.paths import home
    from cluster.sections import source_section
    from cluster.show_sources import PartsDone, show_validation
    from data_services.inspection import validate as validate_source

    check_json(json_file)
    console = open_console()
    with PartsDone(console) as report:
        found = validate_source(source_section(source, keys or []), home(), report)
    write_json(json_file, found.as_dict())
    show_validation(console, found)
    if not found.passed:
        raise typer.Exit(1)
