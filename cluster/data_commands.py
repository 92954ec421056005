"""`gyre mine` and `gyre data …`: thin calls of typed functions, as in `cluster.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cluster.options import Json, Source, SourceKeys, check_json, open_console, write_json

data_app = typer.Typer(help="Look at sources, clean and split them.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, for the result.")]


def mine(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for evaluate, or bm25.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A source, as a recipe's data.sources name it.")],
    keys: SourceKeys = None,
    *,
    out: Out,
    corpus: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Its documents are candidates too; repeatable.")
    ] = None,
    negatives: Annotated[int, typer.Option(help="Negatives of a query.")] = 5,
    from_rank: Annotated[int, typer.Option(help="Leave out ranks below this.")] = 0,
    to_rank: Annotated[int | None, typer.Option(help="First rank left out.", show_default="from rank + negatives")] = (
        None
    ),
    relative_margin: Annotated[
        float | None, typer.Option(help="0.05: at least 5 % of the positive's score below it.")
    ] = None,
    absolute_margin: Annotated[float | None, typer.Option(help="At least so much below the positive.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Largest score of a negative.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Smallest score of a negative.")] = None,
    guide: Annotated[str | None, typer.Option(metavar="MODEL", help="A second opinion: a model, or bm25.")] = None,
    cross_encoder: Annotated[str | None, typer.Option(metavar="MODEL", help="A cross-encoder as the guide.")] = None,
    guide_use: Annotated[
        Literal["filter", "rescore"], typer.Option(help="filter: drop what it puts above the positive.")
    ] = "filter",
    guide_margin: Annotated[float, typer.Option(help="filter: and what is so close below.")] = 0.0,
    choose: Annotated[str, typer.Option(metavar="top|random", help="The nearest of the window, or any.")] = "top",
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    same_text: Annotated[bool, typer.Option(help="Leave out texts equal but for case and spacing.")] = True,
    index: Annotated[str, typer.Option(metavar="flat|ivf", help="Exact, or only the nearest cells.")] = "flat",
    probes: Annotated[int, typer.Option(help="ivf: cells searched for a query.")] = 32,
    shard_rows: Annotated[int, typer.Option(help="Documents that one worker searches at once.")] = 1 << 20,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers that search.")] = 1,
    json_file: Json = None,
) -> None:
    """Mine hard negatives: search, leave out what may answer the query, write the source with them."""
    from cluster.mining import MiningJob
    from cluster.mining import mine as mine_source
    from cluster.sections import parse_section, source_section
    from cluster.show_data import Counts, show_mined
    from data_services.mining.filters import FilterConfig
    from data_services.mining.search import SearchConfig

    check_json(json_file)
    filters: dict[str, Any] = {"negatives": negatives, "from_rank": from_rank, "to_rank": to_rank, "seed": seed}
    filters |= {"absolute_margin": absolute_margin, "relative_margin": relative_margin, "choose": choose}
    filters |= {"max_score": max_score, "min_score": min_score}
    filters["same_text"] = same_text
    search: dict[str, Any] = {"index": index, "probes": probes, "shard_rows": shard_rows}
    job = MiningJob(
        model=model,
        source=source_section(data, keys or []),
        out=out,
        filters=parse_section(FilterConfig, filters, "command line"),
        search=parse_section(SearchConfig, search, "command line"),
        corpora=tuple(source_section(path, []) for path in corpus or []),
        guide=guide,
        cross_encoder=cross_encoder,
        guide_use=guide_use,
        guide_margin=guide_margin,
        workers=workers,
    )
    console = open_console()
    with Counts(console) as counts:
        found = mine_source(job, on_progress=counts)
    write_json(json_file, found.as_dict())
    show_mined(console, found)


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
    from cluster.sections import source_section
    from cluster.show_data import Counts, show_stats

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
    from cluster.sections import source_section
    from cluster.show_data import Counts, show_written

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
    from cluster.sections import source_section
    from cluster.show_data import show_written
    from data_services.splitting import parse_shares

    check_json(json_file)
    done = data.split(source_section(source, keys or []), out, parse_shares(shares), by=by, seed=seed)
    write_json(json_file, done.as_dict())
    show_written(open_console(), done, sides=True)
