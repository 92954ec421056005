"""`gyre mine`: thin calls of typed functions, as in `cluster.cli`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster.options import Json, Out, SourceKeys, check_json, open_console, write_json


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
        str, typer.Option(metavar="filter|rescore", help="filter: drop what it puts above the positive.")
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
    filters |= {"max_score": max_score, "min_score": min_score, "guide_use": guide_use, "guide_margin": guide_margin}
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
        workers=workers,
    )
    console = open_console()
    with Counts(console) as counts:
        found = mine_source(job, on_progress=counts)
    write_json(json_file, found.as_dict())
    show_mined(console, found)
