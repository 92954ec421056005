"""What every benchmark shares: its options, the order of its runs, the spread of its figures, its report.

A figure is measured in processes of their own, one run after another, in turns (A B A B), so that a slow minute of
the machine falls on both sides; ratios are of neighbouring runs, and each is given as median, min and max.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
QUICKSTART = REPOSITORY / "recipes" / "quickstart.yaml"


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--quick", action="store_true", help="few and short runs: whether it works, not a measurement")
    return parser


def against_trainer(description: str, measure: Callable[[argparse.Namespace, Path], dict[str, Any]]) -> None:
    """The command of a benchmark whose peer is Sentence Transformers' trainer; `measure(options, folder)` prints."""
    parser = options(description)
    parser.add_argument("--batch", type=int, default=128, help="pairs of a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a run, after 3 that warm up")
    args = parser.parse_args()
    missing = [name for name in ("sentence_transformers", "datasets", "accelerate") if find_spec(name) is None]
    if missing:
        sys.exit(f"the peer's trainer needs {', '.join(missing)}: pip install -e '.[bench]'")
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as home:
        figures = measure(args, Path(home))
    write(args.json, figures | {"machine": about})


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) in the order of the runs: A B A B, not A A B B."""
    return ((i, name) for i in range(rounds) for name in names)


def spread(values: Sequence[float]) -> dict[str, float]:
    """median, min and max of one figure over the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of above[i] / below[i], the runs of one round."""
    if len(above) != len(below):
        raise ValueError(f"{len(above)} runs and {len(below)} of the other: a ratio takes one of each in every round")
    return spread([a / b for a, b in zip(above, below, strict=True)])


def shown(figure: Mapping[str, float], form: str = "{:.2f}") -> str:
    """`2.41 (2.30–2.52)`"""
    median, low, high = (form.format(figure[key]) for key in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def child(module: str, name: str, arguments: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """`name(**arguments)` in a process of its own with so many threads; module's main is `child_main`.

    Exits with the end of its standard error where it fails.
    """
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true",
        "RAYON_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", module, name, json.dumps(arguments)]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module} {name} {arguments}:\n" + "\n".join(done.stderr.strip().splitlines()[-15:]))
    return json.loads(done.stdout.strip().splitlines()[-1])


def child_main(functions: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """The other side of `child`: the result is the last line of standard output."""
    name, arguments = sys.argv[1:]
    print(json.dumps(functions[name](**json.loads(arguments))))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def machine_line(of: Mapping[str, Any]) -> str:
    busy = "" if of["load"] < 0.5 else "; the machine was busy, take the figures as hints"
    return f"{of['cpu']}, {of['cores']} cores, Python {of['python']}, load {of['load']:.1f} at the start{busy}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(file: Path | None, figures: Mapping[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")
