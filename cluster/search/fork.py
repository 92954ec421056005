"""A fork: a trial that goes on from another one's state, with other settings.

What it takes over is the parent's checkpoint, so all of it: weights, optimizer, momentum encoder, queue, the place in
the data. Its recipe has the parent's settings up to there and its own from there on, so that training this recipe from
its first step gives the same, bit for bit.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.paths import RunPaths
from cluster.prepare import Prepared
from cluster.search.record import Check, Parent, StudyPaths, TrialRecord
from cluster.search.space import Stretch
from trainers.checkpoint import committed, fork, latest, link_or_copy


def course_of(ancestry: Sequence[TrialRecord]) -> list[Stretch]:
    """The settings of a trial from its first step on; ancestry as `StudyPaths.ancestry` gives it."""
    first, *forks = ancestry
    parents = [record.parent for record in forks]
    later = [Stretch(r.settings, p.step, p.steps) for r, p in zip(forks, parents, strict=True) if p is not None]
    return [Stretch(first.settings), *later]


def donate(study: StudyPaths, parent: int, at: Check, child: int, settings: Mapping[str, Any]) -> Parent:
    """Makes trial `child` of the parent as it was found `at` a check. Safe to run again.

    The state is kept beside the child: the parent goes on and removes its old checkpoints. The first time the check is
    the parent's last, and nobody trains it.
    """
    paths, run = study.trial(child), study.trial(parent).run
    if not paths.donated.root.exists():
        (state,) = (checkpoint for checkpoint in committed(run.checkpoints)[-1:] if checkpoint.step == at.step)
        paths.root.mkdir(parents=True, exist_ok=True)
        making = RunPaths(Path(tempfile.mkdtemp(prefix=".donated-", dir=paths.root)))
        shutil.copytree(state.folder, making.checkpoints / state.folder.name, copy_function=link_or_copy)
        _copy_beside(run, making)
        making.root.rename(paths.donated.root)
    origin = Parent(parent, at.step, at.steps)
    paths.begin(child, settings, origin)
    return origin


def take_up(donated: RunPaths, ready: Prepared) -> None:
    """Gives a fork's run, which is ready and has no checkpoint yet, its parent's state."""
    state = latest(donated.checkpoints)
    if state is not None and latest(ready.run.checkpoints) is None:
        _copy_beside(donated, ready.run)
        fork(state, ready.run.checkpoints, ready.lineage())


def _copy_beside(run: RunPaths, there: RunPaths) -> None:
    """What a run goes on with beside its checkpoint: its curves, and the negatives that it mined."""
    if run.metrics.exists():
        shutil.copyfile(run.metrics, there.metrics)
    if run.mined.exists():
        shutil.copytree(run.mined, there.mined, copy_function=link_or_copy, dirs_exist_ok=True)
