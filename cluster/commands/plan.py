"""`gyre plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import Json, Overrides, Recipe, check_json, open_console, write_json
from cluster.planning.hardware import FABRICS, GPUS, UTILISATION

Nodes = Annotated[int, typer.Option("--nodes", min=1, help="How many machines.")]
PerNode = Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs, and workers, of each.")]
Gpu = Annotated[str, typer.Option("--gpu", help=f"Which: {', '.join(GPUS)}.")]
Memory = Annotated[float | None, typer.Option("--gpu-memory", metavar="GB", min=0.001, help="Of each; else the GPU's.")]
Fabric = Annotated[str, typer.Option("--fabric", help=f"Between nodes: {', '.join(FABRICS)}.")]
Utilisation = Annotated[
    float, typer.Option("--utilisation", min=0.01, max=1.0, help="Share of the peak that the model reaches (mfu).")
]
Tokens = Annotated[float | None, typer.Option(min=1, help="Mean tokens of one; none: model.max_tokens.")]


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = 8,
    gpu_memory: Memory = None,
    gpu: Gpu = "h100",
    fabric: Fabric = "ndr",
    utilisation: Utilisation = UTILISATION,
    query_tokens: Tokens = None,
    document_tokens: Tokens = None,
    json_file: Json = None,
) -> None:
    """Say what a recipe takes on GPUs: memory, bytes, seconds of a step, and what fits; exit 3 where nothing does."""
    from cluster.config import load_recipe
    from cluster.planning.planner import Cluster, check_fits
    from cluster.planning.planner import plan as plan_recipe
    from cluster.planning.show import show_plan

    check_json(json_file)
    memory_bytes = None if gpu_memory is None else gpu_memory * 1e9
    cluster = Cluster(nodes, gpus_per_node, gpu, memory_bytes, fabric, utilisation, query_tokens, document_tokens)
    planned = plan_recipe(load_recipe(recipe, overrides or []), cluster)
    write_json(json_file, planned.as_dict())
    show_plan(open_console(), planned, recipe)
    check_fits(planned)
