"""Which code a run was made with."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_TREE = Path(__file__).resolve().parents[1]


def code_revision() -> str:
    """The commit of this checkout, with `+changes` where files differ from it; elsewhere gyre's version."""
    top = _git("rev-parse", "--show-toplevel")
    # A package inside someone's virtual environment may lie in a repository that isn't its own.
    if top is None or Path(top).resolve() != _TREE:
        return _installed()
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return _installed() if commit is None else commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_TREE), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed() -> str:
    try:
        return f"gyre {version('gyre')}"
    except PackageNotFoundError:
        return "unknown"
