"""`gyre data …`: thin calls of typed functions, as in `cluster.cli`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from cluster.commands.options import (
    Json,
    Model,
    Out,
    Overrides,
    Recipe,
    Source,
    SourceKeys,
    check_json,
    open_console,
    write_json,
)

data_app = typer.Typer(
    help="Look at sources and at what training makes of them; clean and split them.", no_args_is_help=True
)

Near = Annotated[float, typer.Option(help="Similarity of near duplicates; 0: exact ones only.")]
Against = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="An evaluation source: rows that it holds too are contaminated.")
]
AgainstSplit = Annotated[str, typer.Option(metavar="SPLIT", help="The split of --against.")]


@data_app.command(epilog="Example: gyre data stats pairs.jsonl positive=answer --against builtin:stdlib-code")
def stats(
    source: Source,
    keys: SourceKeys = None,
    *,
    against: Against = None,
    against_split: AgainstSplit = "train",
    near: Near = 0.8,
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help="Count its tokens; else words.")] = None,
    json_file: Json = None,
) -> None:
    """Counts, lengths, duplicates, classes and examples of a source."""
    from cluster import data
    from cluster.commands.show_data import Counts, show_stats
    from cluster.sections import source_section

    check_json(json_file)
    console = open_console()
    with Counts(console) as counts:
        found = data.stats(
            source_section(source, keys or []),
            against=source_section(against, [f"split={against_split}"]) if against else None,
            near=data.threshold(near),
            tokenizer=tokenizer,
            on_progress=counts,
        )
    write_json(json_file, found.as_dict())
    show_stats(console, found, "tokens" if tokenizer else "words")


@data_app.command(epilog="Example: gyre data dedupe pairs.jsonl --out clean --against builtin:stdlib-code")
def dedupe(
    source: Source,
    keys: SourceKeys = None,
    *,
    out: Out,
    by: Annotated[Literal["query", "document", "pair"], typer.Option(help="What makes two rows the same.")] = "pair",
    near: Near = 0.8,
    against: Against = None,
    against_split: AgainstSplit = "train",
    json_file: Json = None,
) -> None:
    """Write a source without its exact and near duplicates, and without rows of an evaluation source."""
    from cluster import data
    from cluster.commands.show_data import Counts, show_written
    from cluster.sections import source_section

    check_json(json_file)
    console = open_console()
    with Counts(console) as counts:
        done = data.dedupe(
            source_section(source, keys or []),
            out,
            by=by,
            near=data.threshold(near),
            against=source_section(against, [f"split={against_split}"]) if against else None,
            on_progress=counts,
        )
    write_json(json_file, done.as_dict())
    show_written(console, done)


@data_app.command(epilog="Example: gyre data split pairs.jsonl --out parts --shares train=0.9,validation=0.1")
def split(
    source: Source,
    keys: SourceKeys = None,
    *,
    out: Out,
    shares: Annotated[str, typer.Option(help="Sides and their shares, which sum to 1.")] = "train=0.9,validation=0.1",
    by: Annotated[
        Literal["id", "query", "document", "both"], typer.Option(help="What never stands on both sides.")
    ] = "query",
    seed: Annotated[int, typer.Option(min=0, help="Another deal.")] = 0,
    json_file: Json = None,
) -> None:
    """Deal a source's rows to sides by a hash, so that a row never changes side."""
    from cluster import data
    from cluster.commands.show_data import show_written
    from cluster.sections import source_section
    from data_services.splitting import parse_shares

    check_json(json_file)
    done = data.split(source_section(source, keys or []), out, parse_shares(shares), by=by, seed=seed)
    write_json(json_file, done.as_dict())
    show_written(open_console(), done, sides=True)


@data_app.command(epilog="Example: gyre data cluster models:/quickstart@champion pairs.jsonl --clusters 99 --out alike")
def cluster(
    model: Model,
    source: Source,
    keys: SourceKeys = None,
    *,
    out: Out,
    clusters: Annotated[int, typer.Option(help="How many; better fewer than rows / batch.")],
    by: Annotated[Literal["query", "document"], typer.Option(help="Whose vectors: of the query or the positive.")] = (
        "query"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of k-means.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that encode.", show_default="one for each GPU, or node")
    ] = None,
    json_file: Json = None,
) -> None:
    """Give each row of a source its cluster, by k-means over a model's vectors: for data.neighbours."""
    from cluster import data
    from cluster.commands.show_data import Counts, show_clustered
    from cluster.sections import source_section

    check_json(json_file)
    console = open_console()
    with Counts(console) as counts:
        section = source_section(source, keys or [])
        done = data.cluster(model, section, out, clusters, by=by, seed=seed, workers=workers, on_progress=counts)
    write_json(json_file, done.as_dict())
    show_clustered(console, done)


@data_app.command(epilog="Example: gyre data plan recipes/quickstart.yaml --step 100 --workers 4")
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    step: Annotated[int, typer.Option(min=0, help="Which global batch.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Deal it to so many; else as the recipe says.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Take this run's tokenizer; else make it.")] = None,
    json_file: Json = None,
) -> None:
    """Print the rows of a global batch: where each is stored, which worker gets it, its tokens, duplicates."""
    from cluster.config import load_recipe
    from cluster.console import show_planned
    from cluster.data_plan import planned_batch

    check_json(json_file)
    planned = planned_batch(load_recipe(recipe, overrides or []), step, workers, run)
    write_json(json_file, planned.as_dict())
    show_planned(open_console(), planned)


@data_app.command(epilog="Example: gyre data inspect pairs.jsonl positive=answer")
def inspect(
    source: Source,
    keys: SourceKeys = None,
    *,
    examples: Annotated[int, typer.Option(min=1, help="How many records to show.")] = 3,
    json_file: Json = None,
) -> None:
    """Show the layout, the fields and the first records of a source; converts nothing."""
    from cluster.commands.show_sources import show_inspection
    from cluster.paths import home
    from cluster.sections import source_section
    from data_services.inspection import inspect_source

    check_json(json_file)
    found = inspect_source(source_section(source, keys or []), home(), examples)
    write_json(json_file, found.as_dict())
    show_inspection(open_console(), found, source)


@data_app.command(epilog="Example: gyre data convert 's3://bucket/pairs/*.jsonl.zst' format=flagembedding")
def convert(source: Source, keys: SourceKeys = None, json_file: Json = None) -> None:
    """Convert a source to Parquet, as training would at its start; a killed conversion goes on."""
    from cluster.commands.show_sources import show_conversion
    from cluster.console import Progress
    from cluster.paths import home
    from cluster.sections import source_section
    from data_services.inspection import convert as convert_source

    check_json(json_file)
    console = open_console()
    with Progress(console) as progress:
        done = convert_source(source_section(source, keys or []), home(), progress.parts)
    write_json(json_file, done.as_dict())
    show_conversion(console, done, source)


@data_app.command(epilog="Example: gyre data validate pairs.jsonl quarantine_share=0.01 --json validation.json")
def validate(source: Source, keys: SourceKeys = None, json_file: Json = None) -> None:
    """Read every row and list what is malformed, by reason; exit 1 where it is more than quarantine_share."""
    from cluster.commands.show_sources import show_validation
    from cluster.console import Progress
    from cluster.paths import home
    from cluster.sections import source_section
    from data_services.inspection import validate as validate_source

    check_json(json_file)
    console = open_console()
    with Progress(console) as progress:
        found = validate_source(source_section(source, keys or []), home(), progress.parts)
    write_json(json_file, found.as_dict())
    show_validation(console, found)
    if not found.passed:
        raise typer.Exit(1)
