"""What negatives cost: our step over given embeddings against the ways in which peers get theirs.

W gloo processes with one thread each, the same embeddings, fp32 rows everywhere. With a queue of K rows: ours against
the queue replicated on every worker, as Contriever trains (its buffer broadcast again in every forward) and with that
broadcast switched off. With the batch alone: ours without a queue against gathered losses, open_clip's at its defaults
and with local loss and gradient, and Sentence Transformers'. The peers' code is in `benchmarks.negatives_sides`, with
files and commits.

Memory of a worker is what the negatives add to embeddings: `memory_ratio` by torch's allocator, which is what a GPU
would need, too; `rss_ratio` by resident memory, which has the workspace of this machine's matrix products in it. Bytes
are what a worker sends in a step as a ring sends it (trainers/collectives.py), by one counter for all sides. Time is of
whole steps. Ratios are theirs over ours, of runs in turns.

The replicated queue compares a query with its own positive and the queue only, ours with the batch's documents too, in
both directions, and it masks duplicates and reports its metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.common import child, in_turns, machine, machine_line, options, ratios, shown, spread, write

WITH_QUEUE = {"replicated": "replicated queue, as released", "replicated_quiet": "replicated queue, no broadcast"}
IN_BATCH = {
    "gathered": "gathered",
    "gathered_local": "gathered, local loss with gradient",
    "gathered_with_gradient": "gathered with gradient",
}
GROWTH_ROWS = (8_192, 32_768, 131_072, 524_288, 1_048_576)
GROWTH_WORKERS = (1, 2, 4, 8)
MEASURED_BYTES = 8e9
"""A setting is computed and not run where the tensors of all workers would take more than that."""


@dataclass(frozen=True)
class Setting:
    """W, D, B and K of the legend in data_services/schema.py."""

    workers: int
    dim: int
    batch: int
    rows: int

    @property
    def local(self) -> int:
        """b"""
        return self.batch // self.workers


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--workers", type=int, default=4, help="W")
    parser.add_argument("--dim", type=int, default=768, help="D")
    parser.add_argument("--batch", type=int, default=256, help="B, queries over all workers")
    parser.add_argument("--rows", type=int, default=131_072, help="K, a multiple of the batch")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, after one that warms up")
    args = parser.parse_args()
    if args.batch % args.workers or args.rows % args.batch:
        parser.error("--batch must be a multiple of --workers and --rows of --batch: the replicated queue wants it so")
    about = machine()
    print(machine_line(about))
    setting = Setting(args.workers, args.dim, args.batch, args.rows)
    if args.quick:
        setting = replace(setting, workers=2, rows=32 * args.batch)
    figures = measure(setting, 1 if args.quick else args.rounds, 1 if args.quick else args.steps, grow=not args.quick)
    write(args.json, figures | {"machine": about})


def measure(setting: Setting, rounds: int, steps: int, grow: bool) -> dict[str, Any]:
    """All runs, then the figures; prints them as they come."""
    sides = ["ours", *WITH_QUEUE, "ours_in_batch", *IN_BATCH]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for i, side in in_turns(sides, rounds):
        runs[side].append(run(side, setting, steps, "time") | run(side, setting, steps, "memory"))
        print(f"  round {i + 1}, {side}: {_line(runs[side][-1])}", flush=True)
    figures = summary(runs) | {"setting": asdict(setting) | {"rounds": rounds, "steps": steps}}
    show(figures)
    figures["growth"] = list(growth(setting, {side: runs[side][0] for side in runs}, steps, run_any=grow))
    show_growth(figures["growth"])
    return figures


def run(side: str, setting: Setting, steps: int, what: str) -> dict[str, float]:
    given = {"side": side, "setting": asdict(setting), "steps": steps, "what": what}
    return child("benchmarks.negatives_sides", "run", given, threads=1)


def _line(result: dict[str, float]) -> str:
    memory = f"{_mb(result['tensor_bytes'])} MB in tensors, {_mb(result['rss_bytes'])} MB resident"
    return f"{result['seconds_per_step']:.3f} s, {memory}, {_mb(result['wire_bytes'])} MB sent"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Ratios, theirs over ours, by peer, and every side's own figures. runs: by side, one result a round."""
    keys = {
        "memory_ratio": "tensor_bytes",
        "rss_ratio": "rss_bytes",
        "bytes_ratio": "wire_bytes",
        "time_ratio": "seconds_per_step",
    }
    peers = dict.fromkeys(WITH_QUEUE, "ours") | dict.fromkeys(IN_BATCH, "ours_in_batch")

    def values(side: str, key: str) -> list[float]:
        return [result[key] for result in runs[side]]

    figures: dict[str, Any] = {
        ratio: {peer: ratios(values(peer, key), values(ours, key)) for peer, ours in peers.items()}
        for ratio, key in keys.items()
    }
    figures["sides"] = {side: {key: spread(values(side, key)) for key in keys.values()} for side in runs}
    return figures


def show(figures: dict[str, Any]) -> None:
    setting = figures["setting"]
    told = ", ".join(f"{key} {setting[key]:,}" for key in ("workers", "dim", "batch", "rows", "rounds"))
    print(f"{told}; theirs over ours:")
    print(f"{'':>36}  {'memory':>18}  {'resident':>18}  {'bytes sent':>24}  time")
    for peer, name in (WITH_QUEUE | IN_BATCH).items():
        cells = [shown(figures[ratio][peer]) for ratio in ("memory_ratio", "rss_ratio", "bytes_ratio", "time_ratio")]
        print(f"{name:>36}  {cells[0]:>18}  {cells[1]:>18}  {cells[2]:>24}  {cells[3]}")


# How it grows.


def growth(base: Setting, counted: dict[str, dict[str, float]], steps: int, run_any: bool) -> Iterator[dict[str, Any]]:
    """Memory and bytes of a worker for other K, then for other W, one entry a side and setting. What doesn't fit the
    machine, or all with run_any=False, is computed from what was `counted` at the `base` setting."""
    settings = [replace(base, rows=rows) for rows in GROWTH_ROWS]
    settings += [replace(base, workers=workers) for workers in GROWTH_WORKERS if base.batch % workers == 0]
    for setting in settings:
        for side in ("ours", "replicated"):
            told = computed(side, setting, base, counted[side])
            fits = told["tensor_bytes"] * setting.workers < MEASURED_BYTES
            if setting == base:
                told = {key: counted[side][key] for key in told} | {"computed": False}
            elif run_any and fits:
                found = run(side, setting, 1, "memory")
                told = {key: found[key] for key in told} | {"computed": False}
            else:
                told |= {"computed": True}
            yield {"side": side, **asdict(setting), **told}
        for side in IN_BATCH:
            batch = replace(setting, batch=setting.rows)
            yield {"side": side, **asdict(batch), **at_least(side, batch), "computed": True}


def computed(side: str, setting: Setting, base: Setting, counted: dict[str, float]) -> dict[str, float]:
    """tensor_bytes and wire_bytes of a worker, from those counted at the base setting.

    ours        keeps K/W rows and what masks compare, and needs a tile and a few B x D beside, whatever K and W;
                sends in proportion to (W-1)/W, whatever K
    replicated  keeps all K rows, and makes one more copy of them and three b x K of logits; sends every row in each
                forward, and gathers the keys
    """
    k, w, d = setting.rows, setting.workers, setting.dim
    ring, base_ring = ((x.workers - 1) / x.workers for x in (setting, base))
    beside = counted["tensor_bytes"] - counted["kept_bytes"]
    if side == "ours":
        share = -(-k // w)
        vectors = 8 * setting.batch * d
        headers = counted["wire_bytes"] / base_ring - vectors if base_ring else 0
        kept = (share + share // 64) * (4 * d + 32)
        return {"tensor_bytes": kept + beside, "wire_bytes": (vectors + headers) * ring}
    products, then = k * (d + 3 * setting.local), base.rows * (d + 3 * base.local)
    wire = (4 * d * k + 8 + 4 * d * setting.batch) * ring
    return {"tensor_bytes": 4 * d * k + 8 + beside * products / then, "wire_bytes": wire}


def at_least(side: str, setting: Setting) -> dict[str, float]:
    """What a gathered loss over a batch of so many pairs takes at least: both sides whole, and the logits that the
    backward pass needs; and what it sends."""
    whole, b = 4 * setting.batch * setting.dim, setting.local
    logits = {
        "gathered": 2 * setting.batch * setting.batch,
        "gathered_local": 2 * b * setting.batch,
        "gathered_with_gradient": b * setting.batch,
    }
    times = 2 if side == "gathered" else 4  # without and with the gradient on its way back
    ring = (setting.workers - 1) / setting.workers
    return {"tensor_bytes": 2 * whole + 4 * logits[side], "wire_bytes": times * whole * ring}


def show_growth(entries: list[dict[str, Any]]) -> None:
    """One line a setting. A star: computed."""
    titles = {"ours": "ours", "replicated": "replicated", "gathered": "gathered", "gathered_local": "local loss"}
    print("MB of a worker in tensors / sent in a step; gathered losses: at least, with a batch of K pairs; *: computed")
    print(f"{'K':>11} {'W':>3}" + "".join(f"{title:>28}" for title in titles.values()))
    lines: dict[tuple[int, int], dict[str, str]] = {}
    for entry in entries:
        cell = f"{_mb(entry['tensor_bytes'])} / {_mb(entry['wire_bytes'])}{'*' if entry['computed'] else ' '}"
        lines.setdefault((entry["rows"], entry["workers"]), {})[entry["side"]] = cell
    for (rows, workers), cells in lines.items():
        print(f"{rows:>11,} {workers:>3}" + "".join(f"{cells[side]:>28}" for side in titles))


if __name__ == "__main__":
    main()
