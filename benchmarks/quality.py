"""What the quickstart's model is worth on the held-out modules, over several seeds.

Each seed is one whole `gyre train recipes/quickstart.yaml`, whose held-out modules are scored once at its end. The
spread over seeds is a standard deviation (n - 1); each run's own interval over queries is in its result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import QUICKSTART, machine, machine_line, options, write

GYRE = Path(sys.executable).parent / "gyre"
METRIC = "ndcg@10"


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-quality-") as home:
        figures = measure(args, Path(home))
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    runs = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        runs.append(run(seed, home, ["data.epochs=null", "data.steps=30"] if args.quick else []))
        print(f"  seed {seed}: {line(runs[-1])}", flush=True)
    over = [of["metrics"]["trained"][METRIC] - of["metrics"]["bm25"][METRIC] for of in runs]
    mean, deviation = statistics.mean(over), statistics.stdev(over) if len(over) > 1 else 0.0
    figures = {"over_bm25": {"mean": mean, "deviation": deviation}, "each": over, "runs": runs}
    print(f"trained less BM25, {METRIC}, {len(over)} seeds: {mean:.3f} ± {deviation:.3f}")
    return figures


def run(seed: int, home: Path, overrides: list[str]) -> dict[str, Any]:
    """One training run's result; exits with the end of what it said where it fails."""
    file = home / f"seed-{seed}.json"
    command = [str(GYRE), "train", str(QUICKSTART), f"seed={seed}", *overrides, "--json", str(file)]
    done = subprocess.run(command, env=os.environ | {"GYRE_HOME": str(home)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit("\n".join(done.stderr.strip().splitlines()[-5:]))
    result = json.loads(file.read_text())
    return {name: result[name] for name in ("metrics", "validation", "over_bm25", "seconds", "throughput")}


def line(of: dict[str, Any]) -> str:
    scores = ", ".join(f"{model} {row[METRIC]:.4f}" for model, row in of["metrics"].items())
    seconds = of["seconds"]
    return f"{scores}; first step after {seconds['to_first_step']:.0f} s, whole {seconds['total']:.0f} s"


if __name__ == "__main__":
    main()
