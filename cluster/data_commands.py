"""`gyre data …`: thin calls of typed functions, as in `cluster.cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.options import Json, Overrides, Recipe, check_json, open_console, write_json

data_app = typer.Typer(help="Look at sources and at what training makes of them.", no_args_is_help=True)


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
