"""A plan on a terminal."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from cluster.console import show_lines, show_table
from cluster.planning.choices import Choice
from cluster.planning.memory import GIB, Memory
from cluster.planning.planner import Plan

if TYPE_CHECKING:
    from rich.console import Console

PARTS = {
    "weights": "weights",
    "gathered": "weights gathered at a time",
    "masters": "fp32 masters",
    "moments": "moments of AdamW",
    "average": "momentum encoder",
    "queue": "queue rows",
    "gradients": "gradients",
    "reduction": "their reduction: a bucket, the share",
    "activations": "activations of a chunk",
    "exchange": "exchange: queries, tiles",
    "kept_for_loss": "graphs kept for the loss",
}
WIRE = {
    "exchange": "exchange of queries",
    "gradients": "gradients",
    "weights": "weights",
    "average": "momentum encoder",
    "report": "counters",
}


def show_plan(console: Console, plan: Plan, recipe: str) -> None:
    of, cluster = plan.as_written.workload, plan.cluster
    show_lines(
        console,
        f"{cluster.nodes} nodes of {cluster.gpus_per_node} {cluster.gpu}, {plan.memory_bytes / GIB:.0f} GiB each, "
        f"{plan.usable_bytes / GIB:.1f} of them planned with; {of.shape.parameters / 1e9:.2f}B parameters, "
        f"{of.trained / 1e6:,.0f}M trained; {of.local:g} queries a GPU and {of.local_tokens:,.0f} tokens",
        "",
        f"as the recipe is written: {plan.as_written.name}",
    )
    show_table(console, ("on a GPU", "GiB"), _memory_rows(plan.as_written.memory))
    show_table(console, ("sent by a GPU in a step", "MB", "ms"), _wire_rows(plan.as_written))
    show_table(
        console, ("", "peak GiB", "largest budget", "MB sent", "s/step", ""), [_row(plan, c) for c in plan.found]
    )
    show_lines(console, *(f"assumed: {one}" for one in plan.assumptions), *_advice(plan, recipe))


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    rows = [(name, getattr(memory, part)) for part, name in PARTS.items()]
    shown = [(name, f"{value / GIB:.2f}") for name, value in rows if value]
    return [*shown, ("at the peak", f"{memory.peak / GIB:.2f}")]


def _wire_rows(choice: Choice) -> list[tuple[str, str, str]]:
    spent = choice.time.communication
    rows = [(WIRE[part], f"{sent / 1e6:,.2f}", f"{1e3 * spent[part]:.2f}") for part, sent in choice.wire.items()]
    whole = sum(choice.wire.values())
    return [*rows, (f"all, in {choice.messages} messages", f"{whole / 1e6:,.2f}", f"{1e3 * sum(spent.values()):.2f}")]


def _row(plan: Plan, choice: Choice) -> tuple[str, ...]:
    marks = {id(plan.full): "cheapest of every weight", id(plan.lora): "cheapest of LoRA"}
    mark = marks.get(id(choice), "" if choice.fits else "doesn't fit")
    budget = f"{choice.budget_tokens:,}" if choice.fits else "-"
    sent = sum(choice.wire.values()) / 1e6
    peak = f"{choice.memory.peak / GIB:.1f}"
    return choice.name, peak, budget, f"{sent:,.0f}", f"{choice.time.total:.3f}", mark


def _advice(plan: Plan, recipe: str) -> list[str]:
    advised = plan.advised
    if advised is None:
        return []
    if plan.as_written.fits and plan.as_written.time.total <= advised.time.total * 1.02:
        return ["", f"the recipe fits as it is: gyre train {shlex.quote(recipe)}"]
    return ["", f"cheapest that fits: gyre train {shlex.quote(recipe)} {advised.overrides(plan.as_written.workload)}"]
