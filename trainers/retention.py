"""Which checkpoints stay: the newest, the best, one every so many hours, and always one that is whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from trainers.checkpoint import Checkpoint
from trainers.config import CheckpointConfig

# Of those of the steps given that are scored beside training: the value by which the best is chosen, None while it
# isn't known yet.
Scores = Callable[[Collection[int]], Mapping[int, float | None]]


def kept(checkpoints: Sequence[Checkpoint], config: CheckpointConfig, scores: Scores) -> list[Checkpoint]:
    """What stays of committed checkpoints, given and returned oldest first.

    Where the newest isn't whole, the newest that is stays too, whatever the configuration says.
    """
    stay = {c.folder for c in checkpoints[-config.keep :]}
    stay |= {c.folder for c in _best(checkpoints, config.keep_best, scores)}
    if config.keep_every_hours is not None:
        stay |= {c.folder for c in _spaced(checkpoints, config.keep_every_hours * 3600)}
    stay |= {c.folder for c in _fallback(checkpoints)}
    return [c for c in checkpoints if c.folder in stay]


def _best(checkpoints: Sequence[Checkpoint], n: int, scores: Scores) -> list[Checkpoint]:
    """The n of highest score, of equal ones the earlier, and those whose score is still to come."""
    if not n:
        return []
    by_step = scores([c.step for c in checkpoints])
    waiting = [c for c in checkpoints if c.step in by_step and by_step[c.step] is None]
    scored = [(-value, c.step, c) for c in checkpoints if (value := by_step.get(c.step)) is not None]
    return waiting + [c for _, _, c in sorted(scored, key=lambda found: found[:2])[:n]]


def _spaced(checkpoints: Sequence[Checkpoint], seconds: float) -> list[Checkpoint]:
    """The oldest, and each that was committed so long or longer after the one chosen before it."""
    chosen: list[Checkpoint] = []
    for checkpoint in checkpoints:
        if not chosen or checkpoint.committed_at - chosen[-1].committed_at >= seconds:
            chosen.append(checkpoint)
    return chosen


def _fallback(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The newest whole one. The newest of all was read back when it was written: of it only sizes are looked at."""
    if not checkpoints or not checkpoints[-1].damage(contents=False):
        return list(checkpoints[-1:])
    return [next((c for c in reversed(checkpoints[:-1]) if not c.damage()), checkpoints[-1])]
