"""What a plan over very many rows and files takes of the driver before the first batch: seconds and peak memory.

Manifests are made up as the store writes them (row groups of 1,024 rows) and read as it reads them; no row exists. Then
what a run does at its start: the plan, its first and its last batch, and what every task that reads is sent. Each size
runs in a process of its own; `grown_bytes` is its peak resident memory less that after its imports.

`seconds` of all of it at 10^9 rows in 10^5 files should be few, `grown_bytes` well below 1 GB.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import child, child_main, machine, machine_line, options, write

GROUP_ROWS = 1024
SIZES = ((10**6, 10**2), (10**7, 10**3), (10**8, 10**4), (10**9, 10**5))
BATCH = 65_536

T = TypeVar("T")


def main() -> None:
    parser = options(__doc__ or "")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    figures = []
    for rows, files in SIZES[:1] if args.quick else SIZES:
        figures.append(child("benchmarks.metadata", "planned", {"rows": rows, "files": files}, threads=1))
        print(_line(figures[-1]), flush=True)
    write(args.json, {"sizes": figures, "machine": about})


def _line(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{what} {seconds:.2f}" for what, seconds in found["parts_s"].items())
    return (
        f"{found['rows']:>13,} rows in {found['files']:>7,} files: {found['seconds']:.2f} s ({parts}), "
        f"{found['grown_bytes'] / 1e6:.0f} MB more, {found['task_bytes'] / 1e6:.2f} MB to a task"
    )


def planned(rows: int, files: int) -> dict[str, Any]:
    from data_services.store import _load
    from data_services.stream import DataConfig, plan_of

    with tempfile.TemporaryDirectory(prefix="gyre-metadata-") as folder:
        write_manifest(Path(folder), rows, files)
        before, parts = _peak(), dict[str, float]()

        def timed(what: str, call: Callable[[], T]) -> T:
            began = time.perf_counter()
            value = call()
            parts[what] = time.perf_counter() - began
            return value

        source = timed("manifest", lambda: _load("made up", Path(folder)))
        config = DataConfig.model_validate(
            {"sources": [{"path": "rows.jsonl"}], "batch": min(BATCH, rows // 10), "epochs": 1, "duplicates": "allow"}
        )
        plan = timed("plan", lambda: plan_of(config, [source], 0))
        timed("first batch", lambda: plan.rows(0))
        timed("last batch", lambda: plan.rows(plan.steps - 1))
        sent = timed("to a task", lambda: pickle.dumps((plan, source)))
        timed("in a task", lambda: pickle.loads(sent))
    seconds, grown = sum(parts.values()), _peak() - before
    sizes = {"rows": rows, "files": files, "task_bytes": len(sent), "grown_bytes": grown}
    return sizes | {"seconds": seconds, "parts_s": parts}


def write_manifest(folder: Path, rows: int, files: int) -> None:
    """As `data_services.convert` does, of files of equally many rows and a short last row group each."""
    each = rows // files
    groups = [GROUP_ROWS] * (each // GROUP_ROWS) + ([each % GROUP_ROWS] if each % GROUP_ROWS else [])
    manifest = {
        "rows_in": each * files,
        "rows_out": each * files,
        "quarantined": {},
        "quarantine_summary": "",
        "files": [f"part-{i:06}/rows-000.parquet" for i in range(files)],
        "groups_per_file": [len(groups)] * files,
        "row_groups": groups * files,
        "columns": [],
        "fingerprint": "0" * 32,
        "code_version": 0,
        "layout": "pairs",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    child_main({"planned": planned}) if sys.argv[1:2] == ["planned"] else main()
