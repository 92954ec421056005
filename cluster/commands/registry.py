"""`gyre compare`, `models`, `promote`, `rollback`: thin calls of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Json, check_json, open_console, write_json

Name = Annotated[str, typer.Argument(metavar="NAME", help="A registered model.")]
Side = "A stored evaluation (its id or folder), or a MODEL."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=f"What is compared with. {Side}")],
    b: Annotated[str, typer.Argument(metavar="B", help=f"What is compared. {Side}")],
    suite: Annotated[
        str | None, typer.Option(metavar="SUITE", help="On which a model is evaluated, if it isn't yet.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="In the place of each task's main metric.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page, too.")] = None,
    json_file: Json = None,
) -> None:
    """Hold B against A: per task the difference, its 95 % interval, p, and the queries that changed most."""
    from cluster.console import Progress, show_comparison, show_lines
    from cluster.evidence import comparison
    from cluster.reports.report import keep_comparison
    from cluster.reports.report import report as make

    check_json(json_file)
    check_json(html, "--html")
    console = open_console()
    with Progress(console) as progress:
        found = comparison.compare(a, b, suite, metric, on_progress=progress)
    write_json(json_file, found.as_dict())
    kept = keep_comparison(found)
    show_comparison(console, found)
    page = make(str(kept), html).path if html else None
    show_lines(console, "", f"page    {page}" if page else f"next    gyre report {found.id}")


def list_models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model, with lineage; else all.")] = None,
    json_file: Json = None,
) -> None:
    """List registered versions with aliases and scores; those of one model with where they come from."""
    from cluster import registry
    from cluster.console import show_lineage, show_versions

    check_json(json_file)
    versions = registry.list_models(name)
    write_json(json_file, [v.as_dict() for v in versions])
    console = open_console()
    show_versions(console, versions)
    if name is not None:
        show_lineage(console, versions)


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(metavar="VERSION")],
    gates: Annotated[
        Path | None, typer.Option("--gates", metavar="FILE", help="A team's gate (YAML), beside the recipe's.")
    ] = None,
    sign_off: Annotated[
        str | None, typer.Option("--sign-off", metavar="WHO", help="Put on record that WHO has signed this version.")
    ] = None,
    override: Annotated[
        str | None, typer.Option("--override", metavar="REASON", help="Promote although a gate says no; recorded.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Make a version the champion, if it passes every gate; else exit 3."""
    from cluster import registry
    from cluster.console import Progress, show_move

    check_json(json_file)
    console = open_console()
    try:
        with Progress(console) as progress:
            asked = [registry.read_gates(gates)] if gates else []
            moved = registry.promote(name, version, gates=asked, sign_off=sign_off, override=override, tell=progress)
    except registry.GateFailed as refused:
        from evaluation.report import gate_text

        typer.echo(gate_text(refused.result))
        write_json(json_file, {"refused": str(refused), "gates": refused.rows()})
        raise
    write_json(json_file, moved.as_dict())
    show_move(console, moved)


def rollback(name: Name, json_file: Json = None) -> None:
    """Make the version before the champion the champion again."""
    from cluster import registry
    from cluster.console import show_move

    check_json(json_file)
    moved = registry.rollback(name)
    write_json(json_file, moved.as_dict())
    show_move(open_console(), moved)
