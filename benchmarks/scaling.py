"""How a step scales: measured over gloo processes on this machine, modelled from 8 to 1,024 GPUs.

Measured: the whole step (`benchmarks.scaling_runs`) at 1, 2, 4 and 8 processes, one batch divided among them (strong)
and a batch for each (weak): bytes and messages, memory of a process, seconds, and the share of them in collectives.
With more processes than cores every process waits for its turn: on a machine with two cores the bytes, the messages and
the memory at 8 are what they are anywhere, the seconds are not.

Calibrated: the model of `cluster.planning` takes its rates of arithmetic from runs of one process, and alpha and beta
from bare collectives between two; it is then held against every run, none of which it has seen but the first.

Modelled: a 0.6B and an 8B embedder on GPUs (`benchmarks.scaling_gpus`), from the figures that docs/scaling.md names.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import child, machine, machine_line, options, shown, spread, write
from benchmarks.scaling_gpus import model_tables, show_model, write_plot
from benchmarks.scaling_here import Rates, predicted_s, solved, workload
from cluster.planning.traffic import messages, wire_bytes

WORKERS = (1, 2, 4, 8)
ROWS, BATCH, EACH = 16_384, 256, 64
"""K; B of strong scaling; b of weak scaling."""


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each setting")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--model-only", action="store_true", help="measure nothing: the model of GPUs alone")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the model's plot to FILE, as SVG")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    figures: dict[str, Any] = {} if args.model_only else measured(args, about["cores"])
    figures["model"] = model_tables()
    show_model(figures["model"])
    if args.plot:
        write_plot(args.plot, figures["model"])
    write(args.json, figures | {"machine": about})


def measured(args: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Every run, and the model's seconds beside each."""
    rounds, steps = (1, 1) if args.quick else (args.rounds, args.steps)
    workers = WORKERS[:2] if args.quick else WORKERS
    rates = calibrated(rounds, steps, cores)
    runs: dict[str, list[dict[str, Any]]] = {"strong": [], "weak": []}
    for kind, w in ((kind, w) for w in workers for kind in runs):
        batch = BATCH if kind == "strong" else EACH * w
        runs[kind].append(_told(over(w, batch, ROWS, rounds, steps), w, batch, rates))
        print(f"  {kind}, {w} processes: {_line(runs[kind][-1])}", flush=True)
    setting = {"rounds": rounds, "steps": steps, "rows": ROWS}
    return {"measured": runs, "rates": asdict(rates), "setting": setting}


def over(workers: int, batch: int, rows: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """One result a round, see `scaling_runs.run`."""
    setting = {"workers": workers, "batch": batch, "rows": rows}
    given = {"setting": setting, "steps": steps}
    return [child("benchmarks.scaling_runs", "run", given, threads=1) for _ in range(rounds)]


def calibrated(rounds: int, steps: int, cores: int) -> Rates:
    """From one process with a batch, with twice that, and with that and no queue; and from collectives between two."""
    settings = [(EACH, ROWS), (2 * EACH, ROWS), (2 * EACH, 0)]
    seconds = [min(r["seconds_per_step"] for r in over(1, b, k, rounds, steps)) for b, k in settings]
    sent = child("benchmarks.scaling_runs", "collectives", {"workers": 2}, threads=1)
    return solved(settings, seconds, sent, cores)


def _told(results: list[dict[str, Any]], workers: int, batch: int, rates: Rates) -> dict[str, Any]:
    last, of = results[-1], workload(workers, batch, ROWS)
    seconds = spread([r["seconds_per_step"] for r in results])
    predicted = predicted_s(of, rates)
    return {
        "workers": workers,
        "batch": batch,
        "seconds_per_step": seconds,
        "collective_share": spread([r["collective_s"] / r["profiled_s"] for r in results]),
        "predicted_s": predicted,
        "predicted_over_measured": predicted / seconds["median"],
        "wire_bytes": sum(last["wire_bytes"].values()),
        "predicted_wire_bytes": sum(wire_bytes(of).values()),
        "messages": sum(last["messages"].values()),
        "predicted_messages": messages(of),
        "memory": last["memory"],
        "rss_bytes": last["rss_bytes"],
    }


def _line(run: dict[str, Any]) -> str:
    held = sum(run["memory"].get(part, 0) for part in ("weights", "masters", "moments", "average", "queue"))
    return (
        f"{shown(run['seconds_per_step'], '{:.3f}')} s (model {run['predicted_s']:.3f}), "
        f"{run['wire_bytes'] / 1e6:.2f} MB sent (model {run['predicted_wire_bytes'] / 1e6:.2f}) in {run['messages']} "
        f"messages, {held / 1e6:.1f} MB held and {run['memory']['step'] / 1e6:.1f} in the step, "
        f"{shown(run['collective_share'], '{:.0%}')} in collectives"
    )


if __name__ == "__main__":
    main()
