"""Processes beside training, which rank 0 starts: they end with it, and leave a sentence where they fail.

Processes of their own, since loading a model draws random numbers, and training's must be what they are without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cluster.paths import RunPaths
from data_services.schema import RunError, UsageError


def run_beside(module: str, run: RunPaths, step: int, failed: Path) -> int:
    """Runs `python -m MODULE RUN STEP PARENT` to its end; its exit code. failed: the file of its last sentence."""
    failed.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, str(run.root), str(step), str(os.getpid())]
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code and not failed.exists():
        failed.write_text(f"the process of {module} ended with code {code}")
    return code


def main_beside(work: Callable[[RunPaths, int], None], failed: Callable[[RunPaths, int], Path]) -> None:
    """`main` of such a module. A worker that was killed takes the process along: the next attempt starts its own."""
    run, step, parent = RunPaths(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        work(run, step)
    except (UsageError, RunError, OSError) as error:
        if os.getppid() != parent:
            os._exit(1)
        failed(run, step).write_text(" ".join(str(error).split()))
        sys.exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
