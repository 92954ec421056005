"""`gyre doctor`: this machine, or every node of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.options import Json, check_json, open_console, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.nodes.examine import ClusterDiagnosis

FAILED = 1


def doctor(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Every node of the cluster that RAY_ADDRESS names, and between them.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Say what this machine, or a cluster, can and can't do, with versions; exit 1 where something must be mended."""
    check_json(json_file)
    if cluster:
        from cluster.nodes.examine import examine_cluster

        diagnosis = examine_cluster()
        write_json(json_file, diagnosis.as_dict())
        _show_cluster(open_console(), diagnosis)
        healthy = diagnosis.healthy
    else:
        from cluster.console import show_diagnosis
        from cluster.doctor import examine

        found = examine()
        write_json(json_file, found.as_dict())
        show_diagnosis(open_console(), found)
        healthy = found.healthy
    if not healthy:
        raise typer.Exit(FAILED)


def _show_cluster(console: Console, found: ClusterDiagnosis) -> None:
    from cluster.console import show_findings, show_table

    rows = []
    for name, node in found.nodes.items():
        exchange = found.exchange.get(name)
        speed = f"{exchange.bytes_per_s / 1e9:.2f} GB/s" if exchange else ""
        what = (f"{node.cpus:g}", f"{node.gpus:g}", f"{node.memory_gib:.0f} GiB", f"{node.storage_free_gib:.0f} GiB")
        rows.append((name, node.host, *what, f"{found.clock_s[name] * 1e3:+.1f} ms", speed))
    show_table(console, ("node", "host", "CPUs", "GPUs", "memory", "storage free", "clock", "all-to-all"), rows)
    show_findings(console, found.findings)
