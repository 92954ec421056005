"""Token vectors: our MaxSim step, in which the shorter side travels, against gathering all documents' token vectors.

The peer is PyLate's contrastive loss with gathering across workers: documents' token vectors are all-gathered with
gradient, and every worker holds the similarities of its own queries' tokens with all documents' tokens at once. Same
vectors, same collectives, same loss (one direction, no queue), over given embeddings. Bytes are those of
`Group.traffic`; memory is the most that tensors take at one moment beside the embeddings. What a queue of K documents
would add is computed: K x Ld x D numbers on every worker if replicated, a W-th of it with us.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import child, in_turns, machine, machine_line, options, ratios, shown, spread, write

SIDES = ("ours", "gathered")


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--workers", type=int, default=4, help="gloo processes of one thread each")
    parser.add_argument("--batch", type=int, default=64, help="queries of all workers")
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 1, 3], help="hard negatives a query")
    parser.add_argument("--tokens", type=int, nargs=2, default=[32, 180], help="of a query and of a document")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queue", type=int, default=131_072, help="documents of the queue that is computed")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one that warms up")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    write(args.json, measure(args) | {"machine": about})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rounds, steps = (1, 1) if args.quick else (args.rounds, args.steps)
    figures: dict[str, Any] = {"by_negatives": {}}
    for negatives in args.negatives[:2] if args.quick else args.negatives:
        setting = {
            "workers": args.workers,
            "batch": args.batch,
            "negatives": negatives,
            "query_tokens": args.tokens[0],
            "document_tokens": args.tokens[1],
            "dim": args.dim,
        }
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _, side in in_turns(SIDES, rounds):
            given = {"side": side, "setting": setting, "steps": steps}
            runs[side].append(child("benchmarks.late_interaction_sides", "run", given, threads=1))
        figures["by_negatives"][negatives] = found = summary(runs)
        print(f"{negatives} hard negatives a query; theirs over ours: {_line(found)}", flush=True)
    bytes_each = args.queue * args.tokens[1] * args.dim * 2
    figures["queue_bytes_computed"] = {"replicated": bytes_each, "ours": bytes_each / args.workers}
    print(
        f"a queue of {args.queue} documents in bf16 on each worker, computed: replicated {bytes_each / 1e9:.1f} GB, ",
        end="",
    )
    print(f"ours {bytes_each / args.workers / 1e9:.1f} GB")
    return figures | {"setting": {"rounds": rounds, "steps": steps, **setting}}


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Ratios theirs / ours, and each side's own figures."""

    def of(side: str, key: str) -> list[float]:
        return [run[key] for run in runs[side]]

    keys = {"bytes_ratio": "wire_bytes", "memory_ratio": "tensor_bytes", "time_ratio": "seconds_per_step"}
    return {
        **{ratio: ratios(of("gathered", key), of("ours", key)) for ratio, key in keys.items()},
        **{side: {key: spread(of(side, key)) for key in keys.values()} for side in SIDES},
    }


def _line(found: dict[str, Any]) -> str:
    return ", ".join(f"{name.removesuffix('_ratio')} {shown(found[name])}" for name in found if name.endswith("_ratio"))


if __name__ == "__main__":
    main()
