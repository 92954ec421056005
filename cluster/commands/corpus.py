"""`gyre embed` and `gyre mine`, what a model makes of a corpus: thin calls of typed functions, as in `cluster.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cluster.commands.options import Json, Model, Out, SourceKeys, check_json, open_console, write_json


def embed(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A source, as a recipe's data.sources name it.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, or one to go on with.")],
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value …]",
            help="Keys of the source: split, query, positive, id, title; text=FIELD for a corpus without queries.",
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE", help="document or query: which texts, and by which prompt.", show_default="document"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="fp32, fp16, int8, uint8, binary or ubinary.", show_default="fp32"),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Leading dimensions that are kept.", show_default="all")
    ] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows of a file.", show_default="1,024 to 32,768")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that encode.", show_default="one for each GPU, or node")
    ] = None,
    json_file: Json = None,
) -> None:
    """Embed a corpus: its vectors as Parquet shards. Killed, the same command goes on where it stood."""
    from cluster.console import Progress, show_embedding
    from cluster.embedding import EmbeddingJob, corpus_section, embed_source
    from cluster.sections import parse_section
    from data_services.embed import EmbedConfig

    check_json(json_file)
    given = {"field": field, "dtype": dtype, "dimensions": dimensions, "shard_rows": shard_rows}
    config = parse_section(EmbedConfig, {k: v for k, v in given.items() if v is not None}, "command line")
    job = EmbeddingJob(model, corpus_section(data, keys or []), out, config, workers)
    console = open_console()
    with Progress(console) as progress:
        found = embed_source(job, on_progress=progress)
    write_json(json_file, found.as_dict())
    show_embedding(console, found)


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
    from cluster.commands.show_data import Counts, show_mined
    from cluster.mining import MiningJob
    from cluster.mining import mine as mine_source
    from cluster.sections import parse_section, source_section
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
