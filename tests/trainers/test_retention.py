"""Which checkpoints stay, against the sentences of the configuration."""

from hypothesis import given
from hypothesis import strategies as st

from trainers.checkpoint import Checkpoint
from trainers.config import CheckpointConfig
from trainers.retention import kept


class Fake(Checkpoint):
    """One that is whole unless it is told otherwise."""

    def damage(self, part=0, parts=1, contents=True):
        return "damaged" if self.unreadable else ""


def fakes(root, hours, damaged=()):
    return [
        Fake(root / f"step-{i:08d}.abc", i, 1, at * 3600.0, {}, "x" if i in damaged else "")
        for i, at in enumerate(hours)
    ]


def stays(checkpoints, scores=None, **keys):
    found = kept(checkpoints, CheckpointConfig(**keys), lambda steps: scores or {})
    return [c.step for c in found]


def test_the_newest(tmp_path):
    assert stays(fakes(tmp_path, range(5)), keep=2) == [3, 4]


def test_the_best_and_those_that_wait_for_their_score(tmp_path):
    scores = {0: 0.4, 1: 0.9, 2: 0.9, 3: None, 4: 0.1}
    assert stays(fakes(tmp_path, range(6)), scores, keep=1, keep_best=1) == [1, 3, 5]
    assert stays(fakes(tmp_path, range(6)), scores, keep=1, keep_best=2) == [1, 2, 3, 5]
    assert stays(fakes(tmp_path, range(6)), scores, keep=1) == [5]


def test_one_every_so_many_hours(tmp_path):
    hours = [0, 0.5, 1.1, 1.9, 2.0, 2.2, 7, 7.5]
    assert stays(fakes(tmp_path, hours), keep=1, keep_every_hours=1) == [0, 2, 5, 6, 7]


def test_a_damaged_newer_one_does_not_count(tmp_path):
    assert stays(fakes(tmp_path, range(5), damaged=(3, 4)), keep=1) == [2, 4]
    assert stays(fakes(tmp_path, range(3), damaged=(0, 1, 2)), keep=1) == [2]


@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=25),
    st.integers(1, 4),
    st.integers(0, 3),
    st.none() | st.floats(0.2, 5),
    st.data(),
)
def test_retiring_after_every_checkpoint_or_once_at_the_end_never_loses_what_should_stay(
    tmp_path_factory, gaps, keep, keep_best, every, data
):
    """As the loop does it: after each commit. What was let go of is never wanted later."""
    root, hours, at = tmp_path_factory.getbasetemp(), [], 0.0
    for gap in gaps:
        hours.append(at := at + gap)
    scores = {i: data.draw(st.floats(0, 1)) for i in range(len(gaps))}
    damaged = data.draw(st.sets(st.integers(0, len(gaps) - 1)))
    every_one = fakes(root, hours, damaged)
    config = CheckpointConfig(keep=keep, keep_best=keep_best, keep_every_hours=every)
    there: list[Checkpoint] = []
    for checkpoint in every_one:
        there = kept([*there, checkpoint], config, lambda steps: {s: scores[s] for s in steps})
        seen = every_one[: checkpoint.step + 1]
        assert any(not c.damage() for c in there) == any(not c.damage() for c in seen)
    at_once = kept(every_one, config, lambda steps: {s: scores[s] for s in steps})
    assert {c.step for c in at_once} - {c.step for c in there} == set()
