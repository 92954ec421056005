"""The loss kernels on one GPU against what a user would write: seconds, memory, share of the card's bf16 peak.

One InfoNCE loss of B queries and its gradients, from bfloat16 unit vectors, at temperature 0.05, in two settings:
`queue`, B documents that take gradients and K stored rows (the goal is stated for this one), and `fresh`, where all K
candidates take gradients.

  ours      trainers/objectives/kernels.py
  dense     one matrix product and a cross-entropy in float32
  compiled  the same under torch.compile
  ring      block after block as in Inf-CLIP, transcribed, on one device
  inf_cl    Inf-CLIP's own kernels, where the package is installed (pip install inf_cl)

Needs a GPU of compute capability 8.0; without one it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.common import child, in_turns, machine, machine_line, options, ratios, shown, spread, write

# Dense bf16 operations per second by data sheet, NVIDIA's, without sparsity; the first name that fits.
DATA_SHEET = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
PEERS = ("dense", "compiled", "ring", "inf_cl")
SETTINGS = ("queue", "fresh")


def main() -> None:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batch", type=int, default=16_384, help="B (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=262_144, help="K (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=1024, help="D (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side (default: %(default)s)")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    card = child("benchmarks.kernel_runs", "card", {}, threads=4)
    if card["name"] is None:
        print("no GPU here: nothing is measured")
    figures = {} if card["name"] is None else measure(args, card)
    write(args.json, figures | {"machine": about, "card": card})


def measure(args: argparse.Namespace, card: dict[str, Any]) -> dict[str, Any]:
    """All runs, then the figures; prints them as they come."""
    batch, rows, rounds, repeats = args.batch, args.rows, args.rounds, 10
    if args.quick:
        batch, rows, rounds, repeats = 1024, 16_384, 1, 3
    peak = child("benchmarks.kernel_runs", "peak", {"size": 8192, "repeats": 20}, threads=4)["flops_per_s"]
    sheet = next((flops for name, flops in DATA_SHEET.items() if name in card["name"]), None)
    print(f"{card['name']}, torch {card['torch']}: bf16 {peak / 1e12:.0f} TFLOP/s in a product of 8192 x 8192 x 8192,")
    print(f"  {sheet / 1e12:.0f} by its data sheet" if sheet else "  no data sheet figure known")
    sides = ["ours", *(peer for peer in PEERS if peer != "inf_cl" or card["inf_cl"])]
    figures: dict[str, Any] = {"peak_flops_per_s": {"measured": peak, "data_sheet": sheet}}
    for setting in SETTINGS:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for i, side in in_turns(sides, rounds):
            given = {"side": side, "setting": setting, "batch": batch, "rows": rows, "dim": args.dim}
            runs[side].append(child("benchmarks.kernel_runs", "run", given | {"repeats": repeats}, threads=4))
            print(f"  {setting}, round {i + 1}, {side}: {_line(runs[side][-1])}", flush=True)
        _check_agreement(runs)
        figures[setting] = summary(runs, operations(setting, batch, rows, args.dim), peak, sheet)
        show(setting, figures[setting])
    figures["setting"] = {"batch": batch, "rows": rows, "dim": args.dim, "rounds": rounds, "repeats": repeats}
    return figures | {key: figures["queue"][key] for key in ("share_of_peak", "over_dense", "over_ring")}


def operations(setting: str, batch: int, rows: int, dim: int) -> dict[str, int]:
    """Floating-point operations of our products, and of those that aren't recomputation.

    A fresh candidate takes four products with every query: forward, again in the backward pass, and one for each
    gradient. A stored row takes two, both in the forward pass.
    """
    product, fresh = 2 * batch * dim, rows if setting == "fresh" else batch
    stored = rows if setting == "queue" else 0
    return {"done": product * (4 * fresh + 2 * stored), "useful": product * (3 * fresh + 2 * stored)}


def summary(
    runs: dict[str, list[dict[str, Any]]], flops: dict[str, int], peak: float, sheet: float | None
) -> dict[str, Any]:
    """Of one setting: shares of the peak (by data sheet; measured where that isn't known), and time and memory of every
    peer over ours; a peer that ran out of memory has none."""
    seconds = {side: [run["seconds"] for run in of] for side, of in runs.items() if of[0]["seconds"]}

    def share(kind: str, of: float) -> dict[str, float]:
        return spread([flops[kind] / s / of for s in seconds["ours"]])

    figures: dict[str, Any] = {
        "share_of_peak": share("done", sheet or peak),
        "share_of_measured_peak": share("done", peak),
        "useful_share_of_peak": share("useful", sheet or peak),
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "peak_bytes": {side: runs[side][0]["peak_bytes"] for side in seconds},
        "out_of_memory": [side for side in runs if side not in seconds],
    }
    for peer in runs:
        over = ratios(seconds[peer], seconds["ours"]) if peer in seconds else None
        if peer != "ours":
            figures[f"over_{peer}"] = over
    return figures


def _check_agreement(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Exits where a side computed something else: to within bfloat16."""
    mine = runs["ours"][0]
    for side, (first, *_) in runs.items():
        if first["seconds"] is not None and not all(
            abs(first[key] - mine[key]) <= 0.02 * abs(mine[key]) for key in ("loss", "gradient_norm")
        ):
            sys.exit(f"{side} found {first}, ours {mine}: they don't compute the same loss")


def _line(run: dict[str, Any]) -> str:
    if run["seconds"] is None:
        return "out of memory"
    return f"{run['seconds'] * 1e3:.2f} ms, peak {run['peak_bytes'] / 2**30:.2f} GiB beside its inputs"


def show(setting: str, figures: dict[str, Any]) -> None:
    shares = {"": "share_of_peak", " of the measured peak": "share_of_measured_peak"}
    told = (f"{shown(figures[key], '{:.1%}')}{of}" for of, key in shares.items())
    print(f"{setting}: {', '.join(told)}; without recomputation {shown(figures['useful_share_of_peak'], '{:.1%}')}")
    for peer in PEERS:
        if figures.get(f"over_{peer}"):
            memory = figures["peak_bytes"][peer] / figures["peak_bytes"]["ours"]
            print(f"  {shown(figures[f'over_{peer}'])} times faster than {peer}, {memory:.1f} times less memory")
        elif peer in figures["out_of_memory"]:
            print(f"  {peer} ran out of memory")


if __name__ == "__main__":
    main()
