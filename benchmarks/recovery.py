"""From the loss of a worker, or of a node, to the first step after it: how long, and where the time goes.

    python -m benchmarks.recovery --json recovery.json

A run of two workers on two of three nodes, raylets on this machine with token authentication. In turns a worker and a
node are killed with -9, at a random moment of a step; Ray Train starts the group again from the last committed
checkpoint, on the third node where one is gone. The steps since that checkpoint, computed again, come on top: what
they take is the checkpoint interval's choice.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import machine, machine_line, options, shown, spread, write

if TYPE_CHECKING:
    from tests.faults.storm import Overcome


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="losses of each kind")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    folder = Path(tempfile.mkdtemp(prefix="gyre-recovery-"))
    try:
        figures = measure(folder, 1 if args.quick else args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write(args.json, figures | {"machine": about})


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    from tests.faults.storm import Fault, run_faults

    draw = random.Random(0)
    kinds = ["worker", "node"] * rounds
    faults = [Fault(kind, draw.randint(8, 16), draw.uniform(0, 0.2)) for kind in kinds]
    _, _, overcome = run_faults(folder, faults)
    figures: dict[str, Any] = {"rounds": rounds}
    for kind in ("worker", "node"):
        its = [o for o in overcome if o.fault.kind == kind]
        figures[f"{kind}_loss_s"] = spread([o.seconds for o in its]) | {"parts_s": parts(its)}
        print(f"{kind} loss: {shown(figures[f'{kind}_loss_s'], '{:.1f}')} s to the first step after it")
        for part, figure in figures[f"{kind}_loss_s"]["parts_s"].items():
            print(f"  {shown(figure, '{:5.1f}'):>24} s  {part}")
    return figures


def parts(its: list[Overcome]) -> dict[str, Any]:
    return {part: spread([o.parts_s[part] for o in its]) for part in its[0].parts_s}


if __name__ == "__main__":
    main()
